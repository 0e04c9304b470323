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


def nearest(train: Rows, test: Rows) -> list[str]:
    """Return for each held-out row the answer of the training row whose question is most similar by trigrams."""

    def get_trigrams(text: str) -> set[str]:
        return {text[i : i + 3] for i in range(len(text) - 2)}

    answers = [(get_trigrams(row["question"]), row["answer"]) for row in train]

    def answer(row: dict[str, str]) -> str:
        trigrams = get_trigrams(row["question"])
        return max(answers, key=lambda pair: len(trigrams & pair[0]) / len(trigrams | pair[0]))[1]

    return [answer(row) for row in test]


def with_examples(train: Rows, test: Rows) -> list[str]:
    """Return the answers of the base model to prompts with three examples of the same task and language."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(EMBEDDED / "tiny", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    draw, answers = random.Random(0), []
    for row in test:
        candidates = [one for one in train if (one["task"], one["language"]) == (row["task"], row["language"])]
        examples = "".join(f"{one['question']} {one['answer']}\n" for one in draw.sample(candidates, 3))
        ids = tokenizer(f"{examples}{row['question']} ", return_tensors="pt")
        stop = tokenizer("\n")["input_ids"]
        output = model.generate(**ids, max_new_tokens=16, do_sample=False, eos_token_id=stop)
        answers.append(tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip())
    return answers


def scores(test: Rows, answers: list[str]) -> dict[str, float]:
    """Return the share of exact matches per task, and of all rows under `all`."""
    matches = defaultdict(list)
    for row, answer in zip(test, answers, strict=True):
        for name in (row["task"], "all"):
            matches[name].append(answer == row["answer"])
    return {name: sum(hits) / len(hits) for name, hits in matches.items()}


def main() -> int:
    """Print exact match of both baselines."""
    train, test = read("train"), read("test")
    for name, answer in (("nearest training row", nearest), ("base with three examples", with_examples)):
        exact_match = scores(test, answer(train, test))
        print(f"{name}: " + ", ".join(f"{task} {share:.0%}" for task, share in sorted(exact_match.items())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
