"""Counts what `audit` finds of faults that are planted into rows without one, and which clean rows it accuses.

    python benchmarks/planted_faults.py ROWS [ROWS ...] [--each 100]

ROWS are files with questions and answers, JSON or JSONL. Those without a fault by the audit are the clean rows. Each
fault is planted into copies of some of them, which are put behind the others.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path

from audit import read_rows

_LEAST_WORDS = 20  # of an answer that is copied
_FRENCH = "Il faut d'abord compter les pommes du premier panier, puis ajouter celles du second."
_GERMAN = "Zuerst zählt man die Äpfel im ersten Korb, danach nimmt man die aus dem zweiten dazu."
_CHINESE = "先数第一个篮子里的苹果，再加上第二个篮子里的苹果。"
# a kind of fault -> the gate that shall find it, and what is put behind the answer
_ENDINGS = {
    "control character": ("form", "\x07"),
    "text read as Windows-1252": ("form", " Le cafÃ© est fermÃ©."),
    "open code fence": ("complete", "\n```python\nprint(1)"),
    "cut at a word": ("complete", " When all of these are added up in the right order, we see that the"),
    "loop": ("complete", " and then it goes on" * 60),
    "end-of-turn token": ("artefact", "<|im_end|>"),
    "next turn": ("artefact", "\nHuman: What is the next thing to do?"),
    "e-mail address": ("personal", " Ask paula{three}@gmail.com."),
    "card number": ("personal", " The credit card is {card}."),
    "telephone number": ("personal", " Call +44 20 7{three} {three}4."),
}
# the same, and what stands in place of the answer
_ANSWERS = {
    "empty answer": ("empty", " \n"),
    "answer in French": ("language", _FRENCH),
    "answer in German": ("language", _GERMAN),
    "answer in Chinese": ("language", _CHINESE),
}
_COPIES = {"equal row": "duplicate", "capital letters": "duplicate", "one word in each part": "duplicate"}
_BEGINNING = "As an AI language model, I cannot count. "


def make_number(generator, length):
    """Return random digits."""
    return "".join(generator.choices("0123456789", k=length))


def make_card(generator):
    """Return a number of 16 digits with the check digit of Luhn."""
    digits = "4" + make_number(generator, 14)
    doubled = [int(digit) * (2 - place % 2) for place, digit in enumerate(reversed(digits))]
    total = sum(value - 9 if value > 9 else value for value in doubled)
    return digits + str(-total % 10)


def change_word(text, generator):
    """Return a text with one word replaced."""
    words = text.split(" ")
    words[generator.randrange(len(words))] = generator.choice(("indeed", "rather", "perhaps"))
    return " ".join(words)


def plant(row, kind, generator):
    """Return a row with a fault of a kind."""
    if kind in _ENDINGS:
        ending = _ENDINGS[kind][1].format(three=make_number(generator, 3), card=make_card(generator))
        return row | {"output": row["output"] + ending}
    if kind in _ANSWERS:
        return row | {"output": _ANSWERS[kind][1]}
    if kind == "capital letters":
        return {name: text.upper() for name, text in row.items()}
    if kind == "one word in each part":
        return {name: change_word(text, generator) for name, text in row.items()}
    return row if kind == "equal row" else row | {"output": _BEGINNING + row["output"]}


def audit(rows, folder):
    """Return the numbers of the rejected rows and the gate of each."""
    path, clean = Path(folder) / "rows.jsonl", Path(folder) / "clean.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [sys.executable, "-m", "trl_sft", "audit", str(path), "--fix", str(clean), "--json"]
    subprocess.run(words, capture_output=True, check=True)
    rejected = clean.with_name("clean.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {entry["line"] - 1: entry["gate"] for entry in map(json.loads, rejected)}


def main():
    """Print a line for each kind of fault, and the clean rows that were accused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path, nargs="+")
    parser.add_argument("--each", type=int, default=100, help="copies with each fault")
    options = parser.parse_args()
    generator, rows = random.Random(0), read_rows(options.rows)
    gates = (
        {kind: gate for kind, (gate, _) in (_ENDINGS | _ANSWERS).items()} | {_BEGINNING.strip(): "artefact"} | _COPIES
    )
    with tempfile.TemporaryDirectory() as folder:
        faulty = audit(rows, folder)
        clean = [row for place, row in enumerate(rows) if place not in faulty]
        long = [row for row in clean if len(row["output"].split()) > _LEAST_WORDS]
        content = list(clean)
        for kind in gates:
            content += [plant(row, kind, generator) for row in generator.sample(long, options.each)]
        found = audit(content, folder)
    for number, (kind, gate) in enumerate(gates.items()):
        start = len(clean) + number * options.each
        names = [found.get(place, "none") for place in range(start, start + options.each)]
        others = {name: names.count(name) for name in names if name != gate}
        print(f"{kind:<42} {gate:<10} {names.count(gate):>4} of {options.each}  {others or ''}")
    accused = [place for place in found if place < len(clean)]
    print(f"{len(clean):,} clean rows, of which {len(accused)} are accused: {[found[place] for place in accused]}")


if __name__ == "__main__":
    main()
