"""Baselines of the quickstart: the base model with three examples in its prompt, and the nearest training row.

python scripts/controls.py      (some seconds; prints exact match per task)
"""

import json
import random
import sys
from collections import defaultdict
from pathlib import Path

EMBEDDED = Path(__file__).parents[1] / "trl_sft" / "embedded"
Rows = list[dict[str, str]]


def read(part: str) -> Rows:
    """Return the rows of a split of `skills`, `train` or `test`."""
    return [json.loads(line) for line in (EMBEDDED / "skills" / f"{part}.jsonl").read_text("utf-8").splitlines()]


def nearest(train: Rows, held: Rows) -> list[str]:
    """Return for each held-out row the answer of the training row whose question is most similar by trigrams."""

    def pieces(text: str) -> set[str]:
        return {text[i : i + 3] for i in range(len(text) - 2)}

    known = [(pieces(row["question"]), row["answer"]) for row in train]

    def answer(row: dict[str, str]) -> str:
        asked = pieces(row["question"])
        return max(known, key=lambda one: len(asked & one[0]) / len(asked | one[0]))[1]

    return [answer(row) for row in held]


def with_examples(train: Rows, held: Rows) -> list[str]:
    """Return what the base answers after three questions with their answers, of the same task and language."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    draw, found = random.Random(0), []
    for row in held:
        like = [one for one in train if (one["task"], one["language"]) == (row["task"], row["language"])]
        shown = "".join(f"{one['question']} {one['answer']}\n" for one in draw.sample(like, 3))
        ids = tokenizer(f"{shown}{row['question']} ", return_tensors="pt")
        stop = tokenizer("\n")["input_ids"]
        made = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=stop)
        found.append(tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return found


def scores(held: Rows, answers: list[str]) -> dict[str, float]:
    """Return the share of exact matches per task, and of all rows under `all`."""
    right = defaultdict(list)
    for row, answer in zip(held, answers, strict=True):
        for name in (row["task"], "all"):
            right[name].append(answer == row["answer"])
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def main() -> int:
    """Print exact match of both baselines."""
    train, held = read("train"), read("test")
    for name, answer in (("nearest training row", nearest), ("base with three examples", with_examples)):
        found = scores(held, answer(train, held))
        print(f"{name}: " + ", ".join(f"{task} {share:.0%}" for task, share in sorted(found.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
