"""The answers to `evaluate.prompts`, which have no expected answer: before, during and after training.

Inputs: prompts with their tokens, a live trainer. Outputs: their answers in samples.jsonl, where each has a `number`
and no row. Not here: reading the prompts (`data.prompts`), when they are answered (`training.sample_answers`), and
held-out prompts (`before_after`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig
from trl import SFTTrainer

from trl_sft import errors
from trl_sft.data import prompts as data_prompts
from trl_sft.data.messages import unescape
from trl_sft.data.rows import RunRows
from trl_sft.errors import DataError, Fault, UserError
from trl_sft.evaluation import before_after
from trl_sft.evaluation.before_after import AFTER, BEFORE, STEPS, STOPPED
from trl_sft.evaluation.generate import GeneratedAnswer, answer_prompts, build_generation_config
from trl_sft.model import positions
from trl_sft.recipe.checked import Run


class OwnPrompt(NamedTuple):
    """One prompt of `evaluate.prompts`."""

    number: int  # its place, from 0
    content: Any  # a text, or messages
    ids: list[int]  # its tokens, as those of a training row


def load(
    run: Run, rows: RunRows, *, encode: Callable[[Any, Any], list[int]], config: PretrainedConfig
) -> list[OwnPrompt]:
    """Return the prompts of `evaluate.prompts` with their tokens; [] = the recipe has none.

    Args:
        run: the checked recipe.
        rows: the formatted rows.
        encode: converts a prompt (a text, or messages) and its tools into the token ids that generation starts from.
        config: of the model, for the number of its positions.

    Raises:
        DataError: prompts that cannot be used; all of them at once.

    """
    prompts, faults = [], []
    limit = positions.read_limit(config)
    for number, prompt in enumerate(data_prompts.read_prompts(run, rows)):
        try:
            ids = encode(prompt.content, prompt.tools)
        except UserError as error:
            faults += error.faults
            continue
        except Exception as error:  # of the template's own code
            problem = f"the chat template does not take this prompt: {errors.first_line(error)}"
            faults.append(Fault(prompt.place, problem, "Correct the prompt.", code="template.refuses_row"))
            continue
        if limit is not None and len(ids) >= limit:
            problem = f"the prompt has {len(ids):,} tokens, and the model knows {limit:,} positions"
            fix = "Shorten the prompt, so that an answer fits."
            faults.append(Fault(prompt.place, problem, fix, code="model.too_few_positions"))
        prompts.append(OwnPrompt(number, unescape(prompt.content), ids))
    if faults:
        raise DataError(faults)
    return prompts


def answer(run: Run, trainer: SFTTrainer, prompts: Sequence[OwnPrompt], *, label: str) -> list[GeneratedAnswer]:
    """Return the live model's answers; sampled ones change nothing in the training that follows.

    Of an answer that the limit cut, `stopped` is None: without an expected answer nothing says how long it should be.

    Args:
        run: the checked recipe.
        trainer: holds the model.
        prompts: what to ask.
        label: what the progress bar says of the model.

    """
    args = trainer.args
    config = build_generation_config(trainer, [], (run.evaluate or {}).get("generation", {}))
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []):
        torch.manual_seed(args.seed)
        answers = answer_prompts(trainer, [prompt.ids for prompt in prompts], config, label=label)
    return [given._replace(stopped=given.stopped or None) for given in answers]


def write_answers(
    path: Path, prompts: Sequence[OwnPrompt], answers: Sequence[GeneratedAnswer], *, when: str
) -> list[dict[str, Any]]:
    """Write answers into samples.jsonl, and return the entries of these prompts.

    Args:
        path: of samples.jsonl.
        prompts: that were asked.
        answers: to each of them.
        when: `before`, `after`, or the step.

    """
    samples = before_after.read_samples(path)
    earlier = {sample["number"]: sample for sample in samples if before_after.is_own(sample)}
    entries = []
    for prompt, given in zip(prompts, answers, strict=True):
        entry = earlier.get(prompt.number, {})
        if when == BEFORE or entry.get("prompt") != prompt.content:  # a new run, or one that resumes with other prompts
            entry = _make_entry(prompt)
        if when in (BEFORE, AFTER):
            entry |= {when: given.text, STOPPED: entry[STOPPED] | {when: given.stopped}}
        else:
            entry |= {STEPS: entry.get(STEPS, {}) | {when: given.text}}
        entries.append(entry)
    held_out = [sample for sample in samples if not before_after.is_own(sample)]
    before_after.write_samples(path, [*held_out, *entries])
    return entries


def list_answered_steps(path: Path, prompts: Sequence[OwnPrompt]) -> set[int]:
    """Return the steps at which all of these prompts are answered in samples.jsonl."""
    entries = [sample for sample in before_after.read_samples(path) if before_after.is_own(sample)]
    if [(entry["number"], entry["prompt"]) for entry in entries] != [(p.number, p.content) for p in prompts]:
        return set()
    steps = [{int(step) for step in entry.get(STEPS, {})} for entry in entries]
    return set.intersection(*steps) if steps else set()


def _make_entry(prompt: OwnPrompt) -> dict[str, Any]:
    """Return the entry of a prompt without answers."""
    return {
        "row": None,
        "number": prompt.number,
        "task": "",
        "prompt": prompt.content,
        "reference": None,
        BEFORE: None,
        AFTER: None,
        STOPPED: {BEFORE: None, AFTER: None},
    }
