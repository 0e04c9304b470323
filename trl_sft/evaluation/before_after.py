"""Base against tuned: the same held-out prompts answered through the same code, before step 1 and at the end.

In: the rows that were held out, a live Trainer. Out: `samples.jsonl` (each prompt with both answers),
`eval.json` (metrics, losses, perplexities, per task) and what the last screen shows. The answers from
before are taken before step 1, when the model still is the base, and written down at once: no second
model is loaded, and a run that goes on does not ask again.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig
from trl import SFTTrainer

from trl_sft import run_folder
from trl_sft.console import format_columns, shows_progress
from trl_sft.data.messages import unescaped
from trl_sft.data.rows import TEXT, RunRows
from trl_sft.evaluation.metrics import METRICS
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

_MAX_ROWS = 100  # held-out prompts that are answered, unless the recipe says otherwise
_MAX_NEW_TOKENS = 256  # of an answer, unless the longest reference is shorter or the recipe says otherwise
_SPARE = 8  # tokens that an answer may have more than the longest reference, so that not stopping shows
_SHOWN = 5  # prompts side by side on the last screen
_LOSS, _ACCURACY = "eval_loss", "eval_mean_token_accuracy"


class Prompt(NamedTuple):
    """One held-out prompt."""

    row: int  # of the held-out rows, from 0
    task: str  # "" = the rows name none
    given: Any  # a text, or messages
    reference: str


class Asked(NamedTuple):
    """What a run asks before and after."""

    prompts: list[Prompt]
    ids: list[list[int]]  # the prompts' tokens, as training rendered them
    example: Any  # one prompt, for the last screen: a text, or messages
    weights: dict[str, int]  # held-out rows by the name they are evaluated under: tokens with loss


class Outcome(NamedTuple):
    """What a run's evaluation found."""

    samples: list[dict[str, Any]]  # row, task, prompt, reference, before, after
    summary: dict[str, Any]  # as in eval.json


def settings(run: Run, held_out: bool) -> dict[Key, Setting]:
    """Return what before and after need of the training: the loss on held-out rows before the first step."""
    if run.evaluate is None or not held_out or run.train.get("eval_on_start") is not None:
        return {}
    return {
        ("train", "eval_on_start"): Setting(True, "to tell at the end what training changed (evaluate: false = off)")
    }


def prompts(run: Run, rows: RunRows, encode: Callable[[Any, Any], list[int]], ledger: Mapping[str, Any]) -> Asked:
    """Return the held-out prompts that are answered, drawn with the run's seed; none for rows of text, or when off.

    Args:
        run: the checked recipe.
        rows: the formatted rows; the held-out ones are asked.
        encode: makes of a prompt (a text, or messages) and its tools the token ids that generation begins with.
        ledger: what became of the rows, as `ledger.json` has it.

    """
    held = rows.eval_rows
    weights = {name: of["tokens"]["trained"] for name, of in ledger["eval"].items()}
    first = rows.train.rows[int(rows.train.order[0])] if held is None else held[0]
    example = first["text"][:40] if rows.row_type == TEXT else _prompt(0, first).given
    if run.evaluate is None or held is None or rows.row_type == TEXT:
        return Asked([], [], example, weights)
    wanted = int(run.evaluate.get("max_rows", _MAX_ROWS))
    draw = random.Random(run.train.get("seed", 42))
    numbers = sorted(draw.sample(range(len(held)), min(wanted, len(held))))
    found = [held[number] for number in numbers]
    ids = [encode(row["prompt"], json.loads(row.get("tools") or "null")) for row in found]
    named = [_prompt(number, row) for number, row in zip(numbers, found, strict=True)]
    if len(rows.eval) > 1:  # rows that name no task are told apart by where they come from
        ends = np.cumsum([len(side.order) for side in rows.eval.values()])
        of = [list(rows.eval)[n] for n in np.searchsorted(ends, numbers, side="right")]
        named = [prompt._replace(task=prompt.task or name) for prompt, name in zip(named, of, strict=True)]
    return Asked(named, ids, example, weights)


def at(history: Sequence[Mapping[str, Any]], step: int, weights: Mapping[str, int]) -> dict[str, Any]:
    """Return the metrics of the evaluation after a step; of several held-out sources also together, by token."""
    found: dict[str, Any] = {}
    for entry in history:
        of = {key: value for key, value in entry.items() if key.startswith("eval_")} if entry["step"] == step else {}
        # TRL logs each source by itself, and its own metrics without the source's name
        name = next((name for name in weights if f"eval_{name}_loss" in of), "")
        shared = {key: value for key, value in of.items() if name and not key.startswith(f"eval_{name}_")}
        found |= {key: value for key, value in of.items() if key not in shared}
        found |= {f"eval_{name}_{key.removeprefix('eval_')}": value for key, value in shared.items()}
    return together(found, weights)


def together(found: Mapping[str, Any], weights: Mapping[str, int]) -> dict[str, Any]:
    """Return metrics of several held-out sources with the mean of all, weighed by their tokens with loss."""
    out = dict(found)
    if set(weights) == {"eval"}:
        return out
    for whole in (_LOSS, _ACCURACY):
        keys = {name: f"eval_{name}_{whole.removeprefix('eval_')}" for name in weights}
        each = {name: found[key] for name, key in keys.items() if key in found}
        if each and len(each) == len(weights):
            out[whole] = sum(each[name] * weights[name] for name in weights) / sum(weights.values())
    return out


def before(run: Run, trainer: SFTTrainer, asked: Asked) -> str:
    """Answer the prompts with the base and write that down; return what is told of it, "" = nothing.

    A run that goes on keeps the answers that it has; one that lacks them under LoRA asks with the adapter off.
    """
    path = run.output_dir / run_folder.SAMPLES
    if not asked.prompts or _kept(path, asked.prompts):
        return ""
    resumed = trainer.state.global_step > 0
    if resumed and not hasattr(trainer.model, "disable_adapter"):
        _write(path, [_sample(prompt) for prompt in asked.prompts])
        return "the base's answers of the first start are gone, so there will be no before and after"
    if resumed:
        with trainer.model.disable_adapter():
            made = answers(run, trainer, asked, "before")
    else:
        made = answers(run, trainer, asked, "before")
    _write(path, [_sample(prompt) | {"before": text} for prompt, text in zip(asked.prompts, made, strict=True)])
    return ""


def after(run: Run, trainer: SFTTrainer, asked: Asked, metrics: Mapping[str, float]) -> Outcome | None:
    """Answer the prompts with the tuned model, write samples.jsonl and eval.json. None without held-out rows.

    `metrics` are those of the last evaluation, as the Trainer names them.
    """
    if _LOSS not in metrics or run.evaluate is None:
        return None
    path = run.output_dir / run_folder.SAMPLES
    known = {sample["row"]: sample for sample in _read(path)} if asked.prompts else {}
    made = answers(run, trainer, asked, "after")
    samples = [
        _sample(prompt) | {"before": known.get(prompt.row, {}).get("before"), "after": text}
        for prompt, text in zip(asked.prompts, made, strict=True)
    ]
    first = at(trainer.state.log_history, 0, asked.weights)
    summary = {
        "prompts": len(samples),
        "before": _losses(first, asked.weights) | _scores(run, samples, "before"),
        "after": _losses(metrics, asked.weights) | _scores(run, samples, "after"),
        "tasks": {
            task: {"prompts": len(of)} | {side: _scores(run, of, side) for side in ("before", "after")}
            for task in sorted({sample["task"] for sample in samples} - {""})
            for of in [[sample for sample in samples if sample["task"] == task]]
        },
    }
    if samples:
        _write(path, samples)
    run_folder.write_text(run.output_dir / run_folder.EVAL, json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    return Outcome(samples, summary)


def answers(run: Run, trainer: SFTTrainer, asked: Asked, side: str) -> list[str]:
    """Return what the live model answers, greedily unless the recipe's `evaluate.generation` says otherwise."""
    if not asked.prompts:
        return []
    model, tokenizer = trainer.model, trainer.processing_class
    config = _generation(run, trainer, asked.prompts)
    size = trainer.args.per_device_eval_batch_size
    # the longest first: what does not fit into memory fails at once, and a batch pads little
    given = asked.ids
    order = sorted(range(len(given)), key=lambda i: -len(given[i]))
    found = [""] * len(given)
    was_training = model.training
    model.eval()
    bar = tqdm(total=len(given), desc=f"answers {side}", unit="prompt", disable=not shows_progress(), leave=False)
    try:
        with torch.no_grad(), trainer.autocast_smart_context_manager():
            for start in range(0, len(order), size):
                batch = order[start : start + size]
                ids, mask = _padded([given[i] for i in batch], tokenizer.pad_token_id, trainer.args.device)
                made = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                for i, tokens in zip(batch, made[:, ids.shape[1] :], strict=True):
                    found[i] = tokenizer.decode(tokens, skip_special_tokens=True)
                bar.update(len(batch))
    finally:
        bar.close()
        model.train(was_training)
    return found


def lines(outcome: Outcome) -> Iterator[str]:
    """Yield what the last screen shows: metrics before and after, per task, five prompts side by side."""
    summary = outcome.summary
    for name in METRICS:
        told = [summary[side].get(name) for side in ("before", "after")]
        if told[1] is None:
            continue
        change = " -> ".join(f"{value:.0%}" for value in told if value is not None)
        yield f"Held-out prompts, {name.replace('_', ' ')}: {change} of {summary['prompts']}"
        for task, of in summary["tasks"].items():
            change = " -> ".join(f"{of[side][name]:.0%}" for side in ("before", "after") if name in of[side])
            yield f"  {task:<20} {change} of {of['prompts']}"
    step = max(1, len(outcome.samples) // _SHOWN)
    shown = outcome.samples[::step][:_SHOWN]
    if shown:
        yield ""
        rows = [("prompt", "wanted", "base", "tuned")]
        said = [[(s[side] or "").strip() or "(nothing)" for side in ("before", "after")] for s in shown]
        rows += [(_last(s["prompt"]), s["reference"], *both) for s, both in zip(shown, said, strict=True)]
        yield from format_columns(rows)


def _generation(run: Run, trainer: SFTTrainer, asked: Sequence[Prompt]) -> GenerationConfig:
    """Return the model's own end tokens with greedy search, and what the recipe says."""
    own = trainer.model.generation_config
    tokenizer = trainer.processing_class
    longest = max(len(tokenizer(prompt.reference)["input_ids"]) for prompt in asked)
    ours = {"do_sample": False, "max_new_tokens": min(longest + _SPARE, _MAX_NEW_TOKENS)}
    stops = {"eos_token_id": own.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    given = (run.evaluate or {}).get("generation", {})
    return GenerationConfig(**ours | stops | given)


def _prompt(number: int, row: Mapping[str, Any]) -> Prompt:
    given, learned = unescaped(row["prompt"]), unescaped(row["completion"])
    reference = learned if isinstance(learned, str) else learned[-1]["content"]
    return Prompt(number, row.get("task") or "", given, reference)


def _padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, each (rows, tokens), padded on the left as generation needs it."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _scores(run: Run, samples: Sequence[dict[str, Any]], side: str) -> dict[str, float]:
    """Return the mean of each metric over samples that have an answer of that side."""
    answered = [sample for sample in samples if sample.get(side) is not None]
    names = (run.evaluate or {}).get("metrics") or list(METRICS)
    if not answered:
        return {}
    return {n: sum(METRICS[n](s[side], s["reference"]) for s in answered) / len(answered) for n in names}


def _losses(entry: Mapping[str, float], weights: Mapping[str, int]) -> dict[str, Any]:
    if _LOSS not in entry:
        return {}
    found: dict[str, Any] = {"loss": entry[_LOSS], "perplexity": math.exp(min(entry[_LOSS], 700.0))}
    found |= {"token_accuracy": entry[_ACCURACY]} if _ACCURACY in entry else {}
    return found | ({"losses": {name: entry[f"eval_{name}_loss"] for name in weights}} if len(weights) > 1 else {})


def _sample(prompt: Prompt) -> dict[str, Any]:
    return {"row": prompt.row, "task": prompt.task, "prompt": prompt.given, "reference": prompt.reference}


def _kept(path: Path, asked: Sequence[Prompt]) -> bool:
    """Tell whether the file holds the base's answers to these prompts."""
    kept = [(s["row"], s["prompt"], s["reference"]) for s in _read(path) if s.get("before") is not None]
    return kept == [(p.row, p.given, p.reference) for p in asked]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError):
        return []


def _write(path: Path, samples: Sequence[dict[str, Any]]) -> None:
    run_folder.write_text(path, "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples))


def _last(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
