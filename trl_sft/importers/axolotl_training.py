"""What the settings of an axolotl file for the optimizer, precision, evaluation, checkpoints and processes become.

Input: the settings. Output: lines of a recipe, and reasons for the settings that need none. Deliberately not here:
model, adapter, rows and loss (`axolotl`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from trl_sft.importers import recipe_parts, tables
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.importers.tables import Table
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.yaml_reader import format_value


def _load_table() -> Table:
    """Return the table of axolotl's settings."""
    return tables.load_table("axolotl")


def _convert_optimizer(settings: Settings) -> Iterator[Outcome]:
    """Yield gradient accumulation, the schedule and the optimizer."""
    table = _load_table()
    key = ("train", "gradient_accumulation_steps")
    if settings.has("gradient_accumulation_steps"):
        yield RecipeLine(key, settings.get("gradient_accumulation_steps"), ("gradient_accumulation_steps",))
    elif settings.get("batch_size"):
        steps = max(settings.get("batch_size") // (settings.get("micro_batch_size") or 1), 1)
        yield RecipeLine(key, steps, ("batch_size",), "This is batch_size / micro_batch_size.")
    else:
        yield RecipeLine(key, 1, (), table.default_note)
    yield from _convert_schedule(settings, table)
    if types.accepts(keys.get_fields("train")["optim"], table.get_value(settings, "optimizer")):
        yield table.make_line(settings, "train.optim", "optimizer")
    else:
        reason = (
            "trl_sft does not have this optimizer and trains with the default. Set `train.optim` to choose another."
        )
        yield OmittedSetting("optimizer", reason, "weights")
    if arguments := settings.get("optim_args"):
        if isinstance(arguments, dict):
            arguments = ",".join(f"{name}={value}" for name, value in arguments.items())
        yield RecipeLine(("train", "optim_args"), arguments, ("optim_args",))


def _convert_schedule(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the learning rate schedule and its arguments."""
    schedule = table.get_value(settings, "lr_scheduler")
    key = ("train", "lr_scheduler_type")
    lowest = settings.get("cosine_min_lr_ratio")
    if schedule in ("one_cycle", "rex"):
        reason = f"trl_sft does not support {schedule} and uses cosine."
        yield RecipeLine(key, "cosine", (), reason)
        reason += " Set `train.lr_scheduler_type` to choose another schedule."
        yield OmittedSetting("lr_scheduler", reason, "weights")
    elif schedule == "cosine" and lowest:
        names = settings.list_present("cosine_min_lr_ratio", "lr_scheduler")
        yield RecipeLine(key, "cosine_with_min_lr", names)
        yield RecipeLine(("train", "lr_scheduler_kwargs"), {"min_lr_rate": lowest}, names)
        if settings.has("lr_scheduler_kwargs"):
            yield OmittedSetting("lr_scheduler_kwargs", "`cosine_min_lr_ratio` takes its place.", "weights")
        return
    else:
        yield table.make_line(settings, "train.lr_scheduler_type", "lr_scheduler")
    if settings.has("lr_scheduler_kwargs"):
        yield RecipeLine(
            ("train", "lr_scheduler_kwargs"), settings.get("lr_scheduler_kwargs"), ("lr_scheduler_kwargs",)
        )
    if settings.has("cosine_min_lr_ratio"):
        reason = f"axolotl reads it with `lr_scheduler: cosine`, not with {schedule}." if lowest else tables.OFF
        yield OmittedSetting("cosine_min_lr_ratio", reason)


def _convert_precision(settings: Settings) -> Iterator[Outcome]:
    """Yield the types of weights and arithmetic."""
    bf16 = settings.get("bf16", settings.get("bfloat16", "auto"))
    names = settings.list_present("bf16", "bfloat16")
    fp16 = settings.get("fp16")
    note = "axolotl loads all weights in bfloat16. TRL trains float32 weights with `bf16: true`."
    if bf16 == "full" and not fp16:
        yield RecipeLine(("train", "bf16"), False, names)
        yield RecipeLine(("model", "dtype"), "bfloat16", names, "axolotl computes in the type of the weights.")
    elif fp16 or bf16 not in (True, "auto"):
        yield RecipeLine(("train", "bf16"), False, names)
    elif bf16 == "auto":
        auto_note = "TRL's default is bf16 where the machine supports it, as with `bf16: auto`."
        yield RecipeLine(("model", "dtype"), "bfloat16", names, join_sentences(note, auto_note))
    else:
        yield RecipeLine(("train", "bf16"), True, names)
        yield RecipeLine(("model", "dtype"), "bfloat16", names, note)
    if fp16:
        yield RecipeLine(("train", "fp16"), True, ("fp16",))
        for name in names:
            yield OmittedSetting(name, "`fp16` takes its place.")
    elif settings.has("fp16"):
        yield OmittedSetting("fp16", tables.OFF)
    if settings.get("float16") and not fp16 and bf16 in (False, None):
        half_note = "axolotl trains weights of this type, and scales no loss."
        yield RecipeLine(("model", "dtype"), "float16", ("float16",), half_note)
    elif settings.has("float16"):
        is_off = not settings.get("float16")
        yield OmittedSetting("float16", tables.OFF if is_off else "`bf16` or `fp16` takes its place.")
    if settings.get("tf32") not in (None, "auto"):
        yield RecipeLine(("train", "tf32"), settings.get("tf32"), ("tf32",))


def _convert_gradient_checkpointing(settings: Settings) -> Iterator[Outcome]:
    """Yield gradient checkpointing and its options."""
    table = _load_table()
    offloading = settings.get("activation_offloading")
    if isinstance(offloading, str):
        note = f"The value was {format_value(offloading)}."
        yield RecipeLine(("train", "activation_offloading"), True, ("activation_offloading",), note)
    elif offloading is not None:
        yield RecipeLine(("train", "activation_offloading"), offloading, ("activation_offloading",))
    value = table.get_value(settings, "gradient_checkpointing")
    key = f"train.{recipe_parts.get_current_name('gradient_checkpointing')}"
    if isinstance(value, bool):
        yield table.make_line(settings, key, "gradient_checkpointing")
    else:
        note = f"The value was {format_value(value)}. Set `train.activation_offloading: true` to offload activations."
        yield table.make_line(settings, key, "gradient_checkpointing", value=True, note=note)
    if value and settings.get("gradient_checkpointing_kwargs"):
        key = f"train.{recipe_parts.get_current_name('gradient_checkpointing_kwargs')}"
        yield table.make_line(settings, key, "gradient_checkpointing_kwargs")


def _convert_warmup(settings: Settings) -> Iterator[Outcome]:
    """Yield the warm-up, in steps or as a share of all steps."""
    table = _load_table()
    if settings.has("warmup_steps"):
        yield table.make_line(settings, "train.warmup_steps", "warmup_steps")
        if settings.has("warmup_ratio"):
            yield OmittedSetting("warmup_ratio", "axolotl does not take it beside `warmup_steps`.")
        return
    limit_note = "" if settings.has("warmup_ratio") else "axolotl takes at most 100 steps."
    note = join_sentences("A value below 1 is a share of all steps.", limit_note)
    yield table.make_line(settings, "train.warmup_steps", "warmup_ratio", note=note)


def _has_evaluation_set(settings: Settings) -> bool:
    """Return whether a recipe for these settings has an evaluation set."""
    return bool(settings.get("test_datasets") or 0 < settings.get("val_set_size", 0) < 1)


def _convert_evaluation(settings: Settings) -> Iterator[Outcome]:
    """Yield when the evaluation set is used."""
    table = _load_table()
    name = "early_stopping_patience"
    if not _has_evaluation_set(settings):
        if settings.get(name):
            yield OmittedSetting(name, "Without an evaluation set no run stops early.", "weights")
        return
    if settings.get(name):
        yield RecipeLine(("run", "early_stopping"), {"patience": settings.get(name)}, (name,))
    if settings.get("evals_per_epoch"):
        yield from _convert_per_epoch(settings, table, "evals_per_epoch")
    elif settings.get("eval_steps"):
        yield table.make_line(settings, "train.eval_steps", "eval_steps")
        yield RecipeLine(("train", "eval_strategy"), "steps", ("eval_steps",))
    elif strategy := settings.get("eval_strategy", settings.get("evaluation_strategy")):
        names = settings.list_enabled(["eval_strategy", "evaluation_strategy"])
        yield RecipeLine(("train", "eval_strategy"), strategy, names)


def _convert_checkpoints(settings: Settings) -> Iterator[Outcome]:
    """Yield when checkpoints are written and read."""
    table = _load_table()
    if settings.get("early_stopping_patience") and _has_evaluation_set(settings):
        pairs = (
            ("saves_per_epoch", "evals_per_epoch"),
            ("save_steps", "eval_steps"),
            ("save_strategy", "eval_strategy"),
        )
        yield from recipe_parts.omit_checkpoints(settings, *pairs)
    elif settings.get("saves_per_epoch"):
        yield from _convert_per_epoch(settings, table, "saves_per_epoch")
    elif settings.get("save_steps"):
        yield table.make_line(settings, "train.save_steps", "save_steps")
        yield RecipeLine(("train", "save_strategy"), "steps", ("save_steps",))
    elif table.get_value(settings, "save_strategy"):
        yield table.make_line(settings, "train.save_strategy", "save_strategy")
    names = settings.list_enabled(["resume_from_checkpoint", "auto_resume_from_checkpoints"])
    if names:
        yield RecipeLine(("run", "resume"), settings.get("resume_from_checkpoint") or "auto", names)
    if len(names) == 2:
        yield OmittedSetting("auto_resume_from_checkpoints", "`resume_from_checkpoint` takes its place.")


def _convert_best_model(settings: Settings) -> Iterator[Outcome]:
    """Yield whether the best checkpoint is loaded at the end: axolotl decides it by the steps where the file does not.

    Follows `HFCausalTrainerBuilder.build`: yes, if there is an evaluation at each checkpoint.
    """
    name, key = "load_best_model_at_end", ("train", "load_best_model_at_end")
    epochs = settings.get("num_epochs", 1.0)

    def get_steps(kind: str) -> float:
        share = 1 / (settings.get(f"{kind}s_per_epoch") * epochs) if settings.get(f"{kind}s_per_epoch") else 1
        return share if share < 1 else settings.get(f"{kind}_steps", 0)

    has_evaluation = bool(settings.get("test_datasets")) or settings.get("val_set_size", 0) > 0
    save_steps, eval_steps = get_steps("save"), get_steps("eval")
    meets = bool(has_evaluation and save_steps and eval_steps and save_steps % eval_steps == 0)
    if settings.get("early_stopping_patience") and _has_evaluation_set(settings):
        if settings.has(name):
            yield OmittedSetting(name, "`run.early_stopping` saves the weights of the best evaluation.")
    elif meets and settings.get(name) is not False:
        names = settings.list_present(name)
        note = "" if names else "axolotl does this where it evaluates at each checkpoint."
        yield RecipeLine(key, True, names, note)
    elif settings.get(name):
        yield OmittedSetting(name, "axolotl does this only where it evaluates at each checkpoint.")
    elif settings.has(name):
        yield OmittedSetting(name, tables.OFF)


def _convert_per_epoch(settings: Settings, table: Table, name: str) -> Iterator[RecipeLine]:
    """Yield the lines for a number of evaluations or checkpoints in an epoch."""
    kind = {"evals_per_epoch": "eval", "saves_per_epoch": "save"}[name]
    number = settings.get(name) * table.get_value(settings, "num_epochs")
    if number <= 1:
        yield RecipeLine(("train", f"{kind}_strategy"), "epoch", (name,), "This is once, at the end.")
        return
    times = "once" if settings.get(name) == 1 else f"{settings.get(name)} times"
    note = f"This is {times} in an epoch, as a share of all steps."
    yield RecipeLine(("train", f"{kind}_steps"), _get_share(settings, kind, number), (name,), note)
    yield RecipeLine(("train", f"{kind}_strategy"), "steps", (name,))


def _get_share(settings: Settings, kind: str, number: float) -> float:
    """Return one of `number` equal parts of a run, rounded down: transformers rounds steps up.

    A checkpoint comes at a multiple of the steps of evaluation where it does in the file, to the last digit.
    """
    part = math.floor(1_000_000 / number) / 1_000_000
    evaluations, saves = settings.get("evals_per_epoch"), settings.get("saves_per_epoch")
    if kind == "save" and evaluations and evaluations % saves == 0:
        multiple = evaluations // saves
        return float(round(multiple * math.floor(1_000_000 / (number * multiple)) / 1_000_000, 6))
    return part


def _convert_hub(settings: Settings) -> Iterator[Outcome]:
    """Yield the upload of checkpoints: `hub_model_id` alone turns it on, privately."""
    if settings.get("hub_model_id"):
        names = ("hub_model_id",)
        note = "axolotl uploads to a private repository as soon as it has this name."
        yield RecipeLine(("train", "hub_model_id"), settings.get("hub_model_id"), names)
        yield RecipeLine(("train", "push_to_hub"), True, names, note)
        yield RecipeLine(("train", "hub_private_repo"), True, names)
        yield RecipeLine(("train", "hub_always_push"), True, names)


def _convert_trackers(settings: Settings) -> Iterator[Outcome]:
    """Yield the trackers of metrics."""
    known = _load_table().vocabulary["trackers"]
    if trackers := settings.list_enabled(known):
        yield RecipeLine(("train", "report_to"), list(dict.fromkeys(known[name] for name in trackers)), trackers)


def _convert_steps(settings: Settings) -> Iterator[Outcome]:
    """Yield what a step does that TRL's default does not."""
    note = _load_table().default_note
    mean_note = "The devices count equally, however many tokens each has."
    yield RecipeLine(("train", "average_tokens_across_devices"), False, (), join_sentences(mean_note, note))
    yield from _convert_incomplete_batch(settings)


def find_attention(settings: Settings) -> str:
    """Return the attention that axolotl uses, without the version of a kernel; empty where none is named."""
    vocabulary = _load_table().vocabulary
    for name, attention in {**vocabulary["attention"], **vocabulary["other_attention"]}.items():
        if settings.get(name):
            return str(attention)
    return re.split("[:@]", str(settings.get("attn_implementation") or ""), maxsplit=1)[0].strip()


def _convert_incomplete_batch(settings: Settings) -> Iterator[Outcome]:
    """Yield whether the last incomplete batch of an epoch is left out."""
    key = ("train", "dataloader_drop_last")
    names = settings.list_present("dataloader_drop_last")
    packs = bool(settings.get("sample_packing"))
    counts_packs = settings.get("multipack_real_batches")
    if not settings.has("multipack_real_batches"):
        counts_packs = _load_table().vocabulary["packing_attention"].get(find_attention(settings)) != "joins"
    if packs and counts_packs:  # `MultipackBatchSampler` counts packs then, and leaves out a batch with too few
        sources = (*names, *settings.list_present("multipack_real_batches"))
        yield RecipeLine(key, True, sources, "axolotl leaves out the last batch where it has too few packs.")
    elif names:
        yield RecipeLine(key, settings.get("dataloader_drop_last"), names)
    elif packs and settings.get("eval_sample_packing") is False:
        drop_note = "axolotl leaves the last incomplete batch out where evaluation does not pack."
        yield RecipeLine(key, True, ("eval_sample_packing",), drop_note)


def _convert_launch(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `launch:`."""
    fsdp = bool(settings.get("fsdp") or settings.get("fsdp_config"))
    if settings.get("fsdp_config"):  # axolotl's older names of the keys begin with `fsdp_`
        config = {str(name).removeprefix("fsdp_"): value for name, value in settings.get("fsdp_config").items()}
        settings = settings._replace(values=settings.values | {"fsdp_config": config})
    yield from recipe_parts.convert_launch(settings, fsdp=fsdp)


STEPS = (
    _convert_optimizer,
    _convert_precision,
    _convert_gradient_checkpointing,
    _convert_warmup,
    _convert_evaluation,
    _convert_checkpoints,
    _convert_best_model,
    _convert_steps,
    _convert_hub,
    _convert_trackers,
    _convert_launch,
)
