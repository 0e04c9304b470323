"""The two screens of a run: the table before step 1, and the last screen.

In: live objects of the Trainer, so that the table shows what runs and not what the recipe asks for. Out: lines.
"""

from __future__ import annotations

import math
import os
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerState
from trl import SFTConfig

from trl_sft import run_folder
from trl_sft.console import format_duration, format_number_of, get_python_command
from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.model.load import unwrap_adapter
from trl_sft.publishing import next_commands
from trl_sft.recipe import paths
from trl_sft.recipe.checked import Run
from trl_sft.training import live
from trl_sft.training.memory import fit

_BUSY = 1.5  # load for each core, above which the machine is busy with more than this run
_ADAM_BYTES = 2 * 4  # of each trained parameter: exp_avg and exp_avg_sq, float32 each


@dataclass(frozen=True)
class LastScreen:
    """What the last screen shows beside the Trainer's own state."""

    seconds: float  # wall time of the run
    verdict: list[str]  # what came out, and what to try
    first_metrics: dict[str, float]  # on held-out rows before step 1; empty = not evaluated
    metrics: dict[str, float]  # on held-out rows at the end; empty = no rows are held out
    trained: list[str]  # what the training loop did
    answers: list[str]  # before and after, side by side
    architecture: str  # the class of the model


def before(args: SFTConfig, state: TrainerState, model: PreTrainedModel, *, rows: int | None) -> list[tuple[str, str]]:
    """Return the table before step 1.

    Args:
        args: the live settings.
        state: the Trainer's state, with the number of steps.
        model: the live model.
        rows: of the live dataset; packs where packing is on; None = a stream.
    """
    # ZeRO-3 leaves a parameter without elements, and its number in `ds_numel`
    trainable = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
    parameters = count_parameters(model)
    groups = live.count_row_groups() if args.world_size > 1 else 1
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * groups
    kind = "packs" if args.packing else "rows"
    epochs = _describe_epochs(state.max_steps / math.ceil(rows / batch)) if rows else ""
    warmup = args.get_warmup_steps(state.max_steps)
    accumulation = f" x {args.gradient_accumulation_steps} accumulated" if args.gradient_accumulation_steps > 1 else ""
    return [
        ("steps", f"{state.max_steps:,}{epochs}"),
        ("batch", f"{batch} {kind} a step ({args.per_device_train_batch_size} at a time{accumulation})"),
        ("warm-up", f"{format_number_of(warmup, 'step') if warmup else 'none'}, then {args.lr_scheduler_type.value}"),
        ("trainable", f"{trainable:,} of {parameters:,} parameters ({trainable / parameters:.1%})"),
        *_quantization_lines(model),
        *_compute_lines(model),
        *_describe_zero_rate(args, state.max_steps),
        ("checkpoints", _describe_checkpoints(args, state, model)),
        *_load_lines(model.device),
    ]


def _describe_epochs(epochs: float) -> str:
    """Return how many epochs the steps are: `, which is 1 epoch`."""
    number = f"{epochs:.3g}"
    return f", which is {number} epoch{'s' * (number != '1')}"


def _describe_zero_rate(args: SFTConfig, steps: int) -> list[tuple[str, str]]:
    """Return a note if the learning rate is 0 in the only step of a run, because that step is the warm-up's first."""
    if steps != 1 or not args.get_warmup_steps(steps):
        return []
    text = "the only step has learning rate 0, since the warm-up begins with 0: nothing is learned."
    return [("note", f"{text} Train more steps, or set `train.warmup_steps: 0`.")]


def _load_lines(device: torch.device) -> list[tuple[str, str]]:
    """Return a note if other programs keep the processor busy, which makes training with several threads slow."""
    if device.type != "cpu" or not hasattr(os, "getloadavg"):
        return []
    load, cores = os.getloadavg()[0], os.cpu_count() or 1  # over the last minute
    if load <= cores * _BUSY:
        return []
    advice = " Set OMP_NUM_THREADS=1 before the command." if torch.get_num_threads() > 1 else ""
    return [("note", f"other programs use this machine: load {load:.1f} on {cores} cores.{advice}")]


def count_parameters(model: PreTrainedModel) -> int:
    """Return the number of all parameters of the live model; of 4-bit weights peft counts two for each byte."""
    peft_count = getattr(model, "get_nb_trainable_parameters", None)
    return int(peft_count()[1]) if peft_count else sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())


def _compute_lines(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return how the loss and the attention of the live model are computed."""
    base = unwrap_adapter(model)
    attention = str(patches.get_attention_name(base.config.get_text_config()))
    if attention == packed_attention.DOCUMENTS:
        attention = "sdpa, one call for each document of a pack"
    lines = [("attention", attention)]
    if hasattr(base, "logits_gib"):
        lines.append(("loss", f"on positions with a label only, at most {base.logits_gib:g} GiB of logits"))
    elif mismatch := cpu_loss.describe_mismatch(model.device):
        lines.append(("loss", mismatch))
    return lines


def _quantization_lines(model: PreTrainedModel) -> list[tuple[str, str]]:
    """Return a line with how many linear layers are quantized, counted in the live model; no line where none is."""
    bits = {"Linear8bitLt": "in 8 bits", "Linear4bit": "in 4 bits"}
    # peft's layers have the same names; bitsandbytes' own lie inside them
    layers = [type(m).__name__ for m in model.modules() if type(m).__module__.startswith("bitsandbytes.")]
    counts = [f"{layers.count(name)} linear layers {text}" for name, text in bits.items() if name in layers]
    if not counts:
        return []
    plain = [m for m in model.modules() if type(m) is torch.nn.Linear and not m.weight.requires_grad]
    return [("quantized", f"{', '.join(counts)}; {len(plain)} not")]


def _describe_checkpoints(args: SFTConfig, state: TrainerState, model: PreTrainedModel) -> str:
    """Return how many checkpoints there are, of what size with the state of Adam, against what the disk has free."""
    parameters = list(model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    saved_parameters = parameters if len(trained) == len(parameters) else trained  # all, or the adapter alone
    weights = sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in saved_parameters)
    optimizer = _ADAM_BYTES * sum(getattr(p, "ds_numel", p.numel()) for p in trained)
    saved = fit.compute_saved_bytes(args, weights=weights, optimizer=optimizer)
    checkpoints = fit.count_checkpoints(args, max_steps=state.max_steps, epochs=state.num_train_epochs)
    note = "" if args.save_only_model else " (with the state of Adam)"
    return fit.describe_disk(args, Path(str(args.output_dir)), saved=saved, checkpoints=checkpoints, note=note)


def after(run: Run, state: TrainerState, screen: LastScreen) -> list[str]:
    """Return the last screen: what happened, whether it worked, where everything is, what to do next."""
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    trained = f", train loss {losses[0]:.4g} -> {losses[-1]:.4g}" if len(losses) > 1 else ""
    steps = f"{state.global_step} step{'s' * (state.global_step != 1)}"
    kind = "adapter" if paths.is_adapter(run.output_dir) else "model"
    checkpoints = ", ".join(path.name for path in run_folder.list_checkpoints(run.output_dir)[-3:])
    return [
        "",
        f"Done: {steps} in {format_duration(screen.seconds)}{trained}",
        *screen.verdict,
        *screen.trained,
        *_evaluation_lines(screen.first_metrics, screen.metrics),
        *screen.answers,
        "",
        f"  {run_folder.shorten_path(run.output_dir)}/",
        f"    {kind}, tokenizer, README.md (model card), training_args.bin (TRL's, a pickle)",
        f"    {run_folder.RESOLVED}   the recipe, with who set each value",
        f"    {run_folder.RUN}        versions, defaults, timings, outcome",
        f"    {run_folder.LOG}       every logged value",
        f"    {run_folder.LEDGER}     counts of every row and token",
        *(
            [f"    {run_folder.EVAL}, {run_folder.SAMPLES}   metrics and answers before and after"]
            * bool(screen.answers)
        ),
        *([f"    {checkpoints}"] * bool(checkpoints)),
        "",
        *_list_next_lines(run, screen.architecture),
    ]


def _list_next_lines(run: Run, architecture: str) -> list[str]:
    """Return the commands that fit the run, each below what it does, and the request that a server answers."""
    folder = run_folder.shorten_path(run.output_dir)
    lines = []
    commands = next_commands.list_next_commands(
        folder, is_adapter=paths.is_adapter(run.output_dir), architecture=architecture
    )
    for number, command in enumerate(commands):
        lines.append(f"{'Or' if number else 'Next:'} {command.title}")
        lines.append(f"  {get_python_command()} -m trl_sft {shlex.join(command.words)}")
    body = next_commands.build_request(next_commands.choose_model_name(run.output_dir))
    return [*lines, f"  {next_commands.format_curl(body)}"]


def _evaluation_lines(first: dict[str, float], metrics: dict[str, float]) -> list[str]:
    """Return the lines about the evaluation set: losses and token accuracy before and after; none without rows."""
    if "eval_loss" not in metrics:
        return []
    names = {"eval_loss": "eval loss", "eval_mean_token_accuracy": "token accuracy"}
    values = [f"{name} {_change(first, metrics, key)}" for key, name in names.items() if key in metrics]
    lines = ["Held-out rows: " + ", ".join(values)]
    for key in metrics:  # of several evaluation sets, each by its name
        name = key.removeprefix("eval_").removesuffix("_loss")
        if key.endswith("_loss") and key != "eval_loss" and "/" not in key:
            lines.append(f"  {name}: eval loss {_change(first, metrics, key)}")
    return lines


def _change(first: dict[str, float], metrics: dict[str, float], key: str) -> str:
    """Return `before -> after` of a metric; the value alone where there is none from before."""
    before = f"{first[key]:.4g} -> " if key in first else ""
    return f"{before}{metrics[key]:.4g}"
