"""The general suite: prompts and texts of the project that show what a model forgot, and whether it still refuses.

Inputs: the files in `suite_rows`, whose README says what each is for. Outputs: prompts with their checks, and
paragraphs. Not here: answers (`cli.evaluate`), and what they tell (`suite_result`).
"""

from __future__ import annotations

import json
from pathlib import Path

from trl_sft.evaluation import items
from trl_sft.evaluation.items import EvaluationItem

GENERAL, UNSAFE, HARMLESS = "general", "unsafe", "harmless"  # the tasks, and the names of the files
MAX_NEW_TOKENS = 96  # of an answer: a refusal and each general answer are shorter
_FOLDER = Path(__file__).parent / "suite_rows"


def read_prompts() -> list[EvaluationItem]:
    """Return the prompts of all three tasks with their checks, numbered from 0."""
    rows = [item for task in (GENERAL, UNSAFE, HARMLESS) for item in items.read_file(_FOLDER / f"{task}.jsonl").items]
    return [item._replace(number=number) for number, item in enumerate(rows)]


def read_texts() -> list[str]:
    """Return the paragraphs whose loss is measured."""
    lines = (_FOLDER / "text.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
