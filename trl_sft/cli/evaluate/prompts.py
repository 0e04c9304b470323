"""The prompts of an evaluation: held-out rows of a run, or rows of a file, with examples for the base model.

Inputs: a run folder or a recipe, and options. Outputs: `EvaluationItem`s, and examples from the training rows. Not
here: tokens (`sides`), and scores (`evaluation.checks`).
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, run_folder
from trl_sft.data.formats import CHAT, TEXT
from trl_sft.data.formatted_columns import read_row
from trl_sft.data.messages import REASONING_KEYS, unescape
from trl_sft.errors import DataError, Fault, RecipeError, UserError, first_line
from trl_sft.evaluation import before_after, items
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.recipe.checked import Run

_ROWS_FOR_EXAMPLES = 200  # of each source, from its beginning
_SEED = 0  # of the draw of examples


class Example(NamedTuple):
    """A training row as an example in a prompt."""

    task: str
    prompt: Any  # a text, or messages: no earlier answer
    completion: Any  # a text, or one message


class Examples(NamedTuple):
    """Examples for the base model's own best prompt."""

    rows: list[Example]
    problem: str  # why there are none; "" = there are some


def read_items(folder: Path, *, data: Path | None, max_rows: int | None) -> list[EvaluationItem]:
    """Return the rows to evaluate.

    Args:
        folder: the run folder.
        data: a JSONL file; None = the held-out prompts of the run.
        max_rows: the most rows; None = all of a file, or as many held-out rows as the run answered.

    Raises:
        UserError: there are no rows, or some cannot be used.

    """
    if data is not None:
        file = items.read_file(data)
        if file.unread_keys:
            console.say(f"{'note':<9} not read in {data.name}: {console.format_names(file.unread_keys)}")
        return file.items[:max_rows]
    found = items.read_samples(before_after.read_samples(folder / run_folder.SAMPLES))
    if not found or (max_rows is not None and max_rows > len(found)):
        found = _read_held_out(folder, max_rows) or found
    if not found:
        problem = "the run has no held-out rows with answers"
        fix = "Name a file of prompts with --data FILE, or hold out rows with `data.eval_fraction` in the next run."
        raise DataError(Fault(str(folder), problem, fix, code="evaluation.no_prompts"))
    return found[:max_rows]


def read_examples(folder: Path, asked: Sequence[EvaluationItem]) -> Examples:
    """Return training rows that can stand before a prompt as examples; none of them is a prompt that is asked.

    Args:
        folder: the run folder, whose resolved.yaml names the training rows.
        asked: the rows to evaluate.

    """
    from trl_sft.training import stages

    if not (folder / run_folder.RESOLVED).is_file():
        return Examples([], f"the folder has no {run_folder.RESOLVED}, so the training rows are not known")
    try:
        _, _, rows = stages.read_first_rows(read_recipe(folder), _ROWS_FOR_EXAMPLES)
    except UserError as error:
        return Examples([], f"the training rows cannot be read: {error.faults[0].problem}")
    except OSError as error:
        return Examples([], f"the training rows cannot be read: {first_line(error)}")
    if rows.row_type == TEXT:
        return Examples([], "the training rows are plain text, without prompts")
    prompts = {_write_key(item.prompt) for item in asked}
    examples = []
    for index in rows.train.order:
        example = _read_example(read_row(rows.train.rows, int(index)), rows.row_type)
        if example is not None and _write_key(example.prompt) not in prompts:
            examples.append(example)
    return Examples(examples, "" if examples else "no training row has one question and one answer")


def choose_examples(examples: Sequence[Example], task: str, number: int) -> list[Example]:
    """Return examples of a task, the same ones for each prompt of it; of other tasks where it has too few."""
    own = [example for example in examples if example.task == task]
    others = [example for example in examples if example.task != task]
    draw = random.Random(_SEED)
    chosen = draw.sample(own, min(number, len(own)))
    return chosen + draw.sample(others, min(number - len(chosen), len(others)))


def add_examples(prompt: Any, examples: Sequence[Example]) -> Any:
    """Return a prompt with examples before it: turns of a chat after its system prompt, or texts."""
    if isinstance(prompt, str):
        return "\n\n".join([*(f"{example.prompt}{example.completion}" for example in examples), prompt])
    system = [turn for turn in prompt[:1] if turn.get("role") == "system"]
    turns = [turn for example in examples for turn in (*example.prompt, example.completion)]
    return [*system, *turns, *prompt[len(system) :]]


def _read_held_out(folder: Path, max_rows: int | None) -> list[EvaluationItem]:
    """Return held-out rows, read by the recipe of the run; [] = it has no resolved.yaml or holds none out."""
    from trl_sft.training import stages

    if not (folder / run_folder.RESOLVED).is_file():
        return []
    run = read_recipe(folder)
    _, _, _, rows = stages.read_rows(run, any_machine=True)
    limits = {"max_rows": max_rows} if max_rows is not None else {}
    run = dataclasses.replace(run, evaluate={**(run.evaluate or {}), **limits})
    selected = before_after.select_prompts(run, rows, encode=lambda _prompt, _tools: [], ledger={"eval": {}})
    return items.read_samples([before_after.describe_prompt(prompt) for prompt in selected.prompts])


def read_recipe(folder: Path) -> Run:
    """Return the recipe of a run as it ran. Raises RecipeError."""
    from trl_sft import load_recipe

    try:
        return load_recipe(folder / run_folder.RESOLVED)
    except (
        RecipeError
    ):  # where `max_steps` of the command line had priority over the epochs of the recipe, it still has
        return load_recipe(folder / run_folder.RESOLVED, ["train.max_steps=1"])


def _read_example(row: Mapping[str, Any], row_type: str) -> Example | None:
    """Return a training row as an example; None = it has earlier answers, tools or a call of them."""
    prompt, completion = unescape(row["prompt"]), unescape(row["completion"])
    if row_type != CHAT:
        return Example(row.get("task") or "", prompt, completion)
    turns = [turn for turn in prompt if turn["role"] != "system"]
    is_plain = len(turns) == 1 and turns[0]["role"] == "user" and not row.get("tools") and len(completion) == 1
    if not is_plain or not {"role", "content"} <= set(completion[0]) <= {"role", "content", *REASONING_KEYS}:
        return None
    answer = {name: completion[0][name] for name in ("role", "content")}  # without a thought, as of an earlier turn
    return Example(row.get("task") or "", turns, answer)


def _write_key(prompt: Any) -> str:
    """Return what two prompts have in common if they ask the same: the text of the last message."""
    return before_after.read_last_message(prompt).strip() if prompt else ""
