"""Counts how many of sixty seeded faults `fix` alone mends, and how many messages hold all that is needed.

    python benchmarks/fix.py

The faults stand in tests/seeded_faults.yaml, with what each recipe was meant to be. A fault is mended if the corrected
recipe has no faults and is the same run as the recipe that was meant: every value of `explain`. A corrected recipe that
is another run is wrong; none may be. A message holds all that is needed if it has each text that the file lists: the
place, the key, the value, what to write.
"""

import contextlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import yaml

from trl_sft import cli, load_recipe
from trl_sft.cli.explain import recipe as explain_recipe

FAULTS = Path(__file__).parents[1] / "tests" / "seeded_faults.yaml"
MODEL, DATA = "model: {name_or_path: trl_sft:tiny}\n", "data: {train: rows.jsonl}\n"
PAIRS = [{"question": f"question {number}", "answer": f"answer {number}"} for number in range(8)]
OTHER = [{"query": pair["question"], "response": pair["answer"]} for pair in PAIRS]


def read_faults():
    """Return the seeded faults by name."""
    return yaml.safe_load(FAULTS.read_text(encoding="utf-8"))


def write_rows(folder):
    """Write the files that the recipes name."""
    lines = [json.dumps(pair) for pair in PAIRS]
    files = {
        "rows.jsonl": "\n".join(lines),
        "other.jsonl": "\n".join(map(json.dumps, OTHER)),
        "nested.json": json.dumps({"version": 1, "data": PAIRS}),
        "semicolons.csv": "question;answer\n" + "\n".join(f"{pair['question']};{pair['answer']}" for pair in PAIRS),
        "empty.jsonl": "\n".join([lines[0], json.dumps({"question": "q", "answer": ""}), lines[1]]),
        "broken.jsonl": "\n".join([lines[0], '{"question": "q", "answer": "a"', lines[1]]),
    }
    for name, text in files.items():
        Path(folder, name).write_text(f"{text}\n", encoding="utf-8")


def fill(text):
    """Return a text of the file with its model and data sections."""
    return text.replace("{model}", MODEL).replace("{data}", DATA)


def run(*words):
    """Run a command in this process; return its exit code and what it prints."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(list(words))
    return code, out.getvalue(), err.getvalue()


def list_values(path):
    """Return every value of the run that a recipe describes, but for the name of its folder."""
    values = {value.key: value.value for value in explain_recipe.iterate_set_values(load_recipe(path))}
    if "runs/" in str(values.get(("train", "output_dir"), "")):  # the default has the name of the recipe
        del values["train", "output_dir"]
    return values


def measure(fault):
    """Return what became of a fault in the current folder: mended, left or wrong; and what its message lacks."""
    for path in Path().glob("*.yaml"):
        path.unlink()
    Path("recipe.yaml").write_text(fill(fault["recipe"]), encoding="utf-8")
    fast = [] if fault.get("rows") else ["--fast"]
    overrides = fault.get("arguments", [])
    code, _, message = run("check", "recipe.yaml", *overrides, *fast)
    lacking = [text for text in fault["needs"] if text not in message] if code == 2 else ["no fault"]
    code, _, _ = run("fix", "recipe.yaml", *overrides, *fast)
    if code != 0:
        return "left", lacking
    Path("intended.yaml").write_text(fill(fault["intended"] or ""), encoding="utf-8")
    is_same = fault["intended"] is not None and list_values("recipe.fixed.yaml") == list_values("intended.yaml")
    return "mended" if is_same else "wrong", lacking


def measure_all():
    """Return the outcome and the missing parts of the message of each seeded fault, by name."""
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_rows(folder)
        return {name: measure(fault) for name, fault in read_faults().items()}


def main():
    """Print the figures, and what is not right."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    faults, results = read_faults(), measure_all()
    mendable = [name for name, fault in faults.items() if fault["intended"] is not None]
    count = {
        outcome: [name for name, (found, _) in results.items() if found == outcome] for outcome in ("mended", "wrong")
    }
    complete = [name for name, (_, lacking) in results.items() if not lacking]
    for name, (outcome, lacking) in results.items():
        is_expected = outcome == ("mended" if name in mendable else "left")
        if not is_expected or lacking:
            print(f"{name}: {outcome}{f'; the message lacks {lacking}' if lacking else ''}")
    print(f"mended by fix alone: {len(count['mended'])} of {len(results)} ({len(mendable)} have one certain meaning)")
    print(f"mended to another run than was meant: {len(count['wrong'])}")
    print(f"messages that hold all that is needed: {len(complete)} of {len(results)}")
    return 1 if count["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
