"""The two screens of a run: the table before step 1, and the last one.

In: live objects of the Trainer, so that the table says what will run and not what was asked. Out: lines.
"""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerState
from trl import SFTConfig

from trl_sft import run_folder
from trl_sft.console import gib, python, say
from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe import paths
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import fit

_ADAM_STATES = 2  # exp_avg and exp_avg_sq, float32 each


def found(notes: Sequence[str], model: str, machine: str, tokens: Sequence[str], rows: Sequence[str]) -> None:
    """Say once what was found before weights: translations, model, machine, the template's tokens, each source."""
    for note in notes:
        say(note)
    told = [("model", model), ("machine", machine)]
    lines([*told, *(("tokens", line) for line in tokens), *(("rows", line) for line in rows)])


def lines(told: Sequence[tuple[str, str]]) -> None:
    """Say names and values, a line each."""
    for name, value in told:
        say(f"{name:<9} {value}")


def before(args: SFTConfig, state: TrainerState, model: PreTrainedModel, rows: int | None) -> list[tuple[str, str]]:
    """Return the table before step 1.

    `rows` are those of the live dataset, packs where packing is on; None = a stream.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counted = getattr(model, "get_nb_trainable_parameters", None)  # peft's knows that 4-bit weights lie two in a byte
    everything = counted()[1] if counted else sum(p.numel() for p in model.parameters())
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    kind = "packs" if args.packing else "rows"
    epochs = f", which is {state.max_steps / math.ceil(rows / batch):.3g} epochs" if rows else ""
    warmup = args.get_warmup_steps(state.max_steps)
    accumulation = f" x {args.gradient_accumulation_steps} accumulated" if args.gradient_accumulation_steps > 1 else ""
    return [
        ("steps", f"{state.max_steps:,}{epochs}"),
        ("batch", f"{batch} {kind} a step ({args.per_device_train_batch_size} at a time{accumulation})"),
        ("warm-up", f"{f'{warmup} steps' if warmup else 'none'}, then {args.lr_scheduler_type.value}"),
        ("trainable", f"{trainable:,} of {everything:,} parameters ({trainable / everything:.1%})"),
        *_quantized(model),
        *_paths(model),
        ("checkpoints", _disk(args, state, model, trainable)),
    ]


def _paths(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return how the loss and the attention of the live model are computed."""
    base = unwrap_adapter(model)
    way = patches.get_attention_name(base.config.get_text_config())
    lines = [
        ("attention", "sdpa, one call for each document of a pack" if way == packed_attention.DOCUMENTS else str(way))
    ]
    if hasattr(base, "logits_gib"):
        lines.append(("loss", f"on labelled positions alone, at most {base.logits_gib:g} GiB of logits"))
    elif mismatch := cpu_loss.describe_mismatch(model.device):
        lines.append(("loss", mismatch))
    return lines


def _quantized(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return a line with how many linear layers are quantized, counted in the model itself; none where none is."""
    kinds = {"Linear8bitLt": "in 8 bits", "Linear4bit": "in 4 bits"}
    # peft's layers have the same names; bitsandbytes' own lie inside them
    layers = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    counts = {words: layers.count(name) for name, words in kinds.items() if name in layers}
    if not counts:
        return []
    plain = [m for m in model.modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad]
    return [
        ("quantized", ", ".join(f"{n} linear layers {words}" for words, n in counts.items()) + f"; {len(plain)} not")
    ]


def _disk(args: SFTConfig, state: TrainerState, model: PreTrainedModel, trainable: int) -> str:
    """Return how many checkpoints, of what size, against what the disk has free."""
    number = fit.kept(args, state.max_steps, state.num_train_epochs)
    if not number:
        return "none before the end (save_strategy: no)"
    frozen_too = all(p.requires_grad for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or frozen_too)
    size = weights + (0 if args.save_only_model else _ADAM_STATES * 4 * trainable)
    free = shutil.disk_usage(
        next(p for p in (Path(str(args.output_dir)), *Path(str(args.output_dir)).parents) if p.exists())
    ).free
    short = " - NOT ENOUGH: set train.save_total_limit" if number * size > free else ""
    return f"at most {number} kept, about {gib(size)} each (Adam), {gib(free)} free on the disk{short}"


def after(
    plan: Run,
    state: TrainerState,
    metrics: tuple[dict[str, float], dict[str, float]],
    seconds: str,
    told: Sequence[str],
    ask: str,
) -> list[str]:
    """Return the last screen: what happened, where everything is, what to do next.

    `metrics` are those on held-out rows before step 1 and at the end, `told` are the lines of the
    evaluation, `ask` is the next command.
    """
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    trained = f", training loss {losses[0]:.4g} -> {losses[-1]:.4g}" if len(losses) > 1 else ""
    lines = [
        "",
        f"Done: {state.global_step} step{'s' * (state.global_step != 1)} in {seconds}{trained}",
        *_held_out(*metrics),
        *told,
        "",
    ]
    folder = shown(plan.output_dir)
    what = "adapter" if paths.is_adapter(plan.output_dir) else "model"
    kept = run_folder.list_checkpoints(plan.output_dir)
    lines += [
        f"  {folder}/",
        f"    {what}, tokenizer, README.md (model card), training_args.bin (TRL's, a pickle)",
        f"    {run_folder.RESOLVED}   the recipe with who set each value",
        f"    {run_folder.RUN}        versions, defaults, timings, outcome",
        f"    {run_folder.LOG}       every logged value",
        f"    {run_folder.LEDGER}     what became of every row and token",
        *([f"    {run_folder.EVAL}, {run_folder.SAMPLES}   before and after, and every answer"] if told else []),
        *(["    " + ", ".join(path.name for path in kept[-3:])] if kept else []),
        "",
        "Next: ask it something",
        f"  {ask}",
    ]
    return lines


def _held_out(first: dict[str, float], metrics: dict[str, float]) -> list[str]:
    """Say whether it worked, from the rows that were not trained on."""
    if "eval_loss" not in metrics:
        return [
            "Whether it worked cannot be told: no rows were held out.",
            "  Add data.eval_fraction: 0.05 (or data.eval: FILE) and train.eval_on_start: true, then run again.",
        ]
    names = {"eval_loss": "loss", "eval_mean_token_accuracy": "token accuracy"}
    told = [
        f"{name} {f'{first[key]:.4g} -> ' if key in first else ''}{metrics[key]:.4g}"
        for key, name in names.items()
        if key in metrics
    ]
    lines = ["Held-out rows: " + ", ".join(told)]
    for key, value in metrics.items():  # of several held-out sources each by its name
        name = key.removeprefix("eval_").removesuffix("_loss")
        if key.endswith("_loss") and key != "eval_loss":
            lines.append(f"  {name}: loss {f'{first[key]:.4g} -> ' if key in first else ''}{value:.4g}")
    if not first:
        lines.append("  Without a value from before training that says little: add train.eval_on_start: true.")
    elif metrics["eval_loss"] >= first["eval_loss"]:
        lines.append("  The held-out loss did not fall: the model did not get better at rows it has not seen.")
    return lines


def asking(code: Sequence[str], prompt: Any) -> str:
    """Return a command that asks the new model one prompt, a text or messages; `code` makes `ask`."""
    took = '[-1]["content"]' if isinstance(prompt, list) else ""
    written = json.dumps(prompt, ensure_ascii=False)  # double quotes stand better in a shell than Python's own
    if any(word in written for word in ("true", "false", "null", "\\u", "\\/")):
        written = repr(prompt)
    call = f'print(ask({written}, max_new_tokens=64)[0]["generated_text"]{took})'
    return f"{python()} -c {shlex.quote('; '.join([*code, call]))}"


def shown(folder: Path) -> str:
    """Return a folder as seen from the current one, where it lies in it."""
    return str(folder.relative_to(Path.cwd())) if folder.is_relative_to(Path.cwd()) else str(folder)
