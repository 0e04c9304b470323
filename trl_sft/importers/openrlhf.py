"""What the flags of OpenRLHF's `train_sft` become.

Input: the words of a command line. Output: lines of a recipe, and reasons for the flags that need none. A default of
OpenRLHF that changes the training compared with trl_sft's becomes a line too. Names, defaults and most notes stand in
`openrlhf.yaml`, which also names the releases; the code here follows its sources.
"""

from __future__ import annotations

import argparse
import string
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

from trl_sft.errors import Fault, RecipeError
from trl_sft.importers import recipe_parts, secret_settings, tables
from trl_sft.importers.settings import CompanionFile, OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.importers.tables import Entry, Table

_OTHER_COMMANDS = tuple(
    f"{name}{ending}"
    for name in ("train_dpo", "train_rm", "train_ppo", "train_ppo_ray", "train_kto", "train_kd", "train_prm")
    for ending in ("", ".py")
)
_TYPES: dict[str, type] = {"str": str, "int": int, "float": float}


def _load_table() -> Table:
    """Return the table of OpenRLHF's flags."""
    return tables.load_table("openrlhf")


def list_names() -> set[str]:
    """Return every flag, flat and dotted."""
    entries = _load_table().entries
    return {*entries, *(entry.flag for entry in entries.values() if entry.flag)}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are faults."""

    def error(self, message: str) -> NoReturn:
        """Raise the message of argparse as a RecipeError."""
        raise RecipeError(
            Fault(
                "openrlhf",
                message,
                "Write the flags of openrlhf.cli.train_sft after `--`.",
                code="import.bad_arguments",
            )
        )


def read(words: Sequence[str]) -> Settings:
    """Read the words of a command line.

    Args:
        words: Flags and values. Words up to `train_sft` start OpenRLHF and are ignored.

    Returns:
        The flags by their flat name; flags that the table lacks by their own.

    Raises:
        RecipeError: A value has the wrong type, or a word belongs to no flag.
    """
    start = 0
    for number, word in enumerate(words, 1):
        if word.endswith(("train_sft", "train_sft.py")):
            start = number
            break
        if word.endswith(_OTHER_COMMANDS):
            problem = f"{word} trains with another objective; trl_sft does supervised fine-tuning only"
            fix = "Import a command of `openrlhf.cli.train_sft`."
            raise RecipeError(Fault("openrlhf", problem, fix, code="import.other_objective"))
    words = words[start:]
    entries = _load_table().entries
    parser = _Parser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name, entry in entries.items():
        _add_flag(parser, name, entry)
    options_in_words = _list_options(words)
    try:
        namespace, unknown_words = parser.parse_known_args(words)
    except argparse.ArgumentError as error:
        options = (error.argument_name or "openrlhf").split("/")
        option = next((option for option in options if option in options_in_words), options[0])
        raise RecipeError(
            Fault(option, error.message, "Write a value of this flag's type.", code="import.wrong_type")
        ) from None
    values = vars(namespace) | _read_unknown_flags(unknown_words)

    def where(name: str, *_path: str | int) -> str:
        dotted = f"--{entries[name].flag}" if name in entries else ""
        return dotted if dotted in options_in_words else f"--{name}"

    secret_settings.register_secrets(values)
    return Settings(values, where)


def _add_flag(parser: argparse.ArgumentParser, name: str, entry: Entry) -> None:
    """Add one flag under its flat and its dotted name."""
    options = dict.fromkeys(f"--{option}" for option in (name, entry.flag) if option)
    if entry.refused:
        parser.add_argument(*options, dest=name, default=argparse.SUPPRESS, nargs="*")
    elif entry.type == "switch":
        parser.add_argument(*options, dest=name, default=argparse.SUPPRESS, action="store_true")
    else:
        kind = _TYPES[entry.type or "str"]
        parser.add_argument(*options, dest=name, default=argparse.SUPPRESS, type=kind, nargs=entry.nargs)


def _list_options(words: Sequence[str]) -> set[str]:
    """Return the options among the words, without their values."""
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def _read_unknown_flags(words: Sequence[str]) -> dict[str, Any]:
    """Return the flags that the table lacks, with their values as text; true = a flag without a value."""
    values: dict[str, Any] = {}
    option = ""
    for word in words:
        if word.startswith("--"):
            option, _, value = word[2:].partition("=")
            values[option] = value or True
        elif not option:
            raise RecipeError(
                Fault("openrlhf", f'"{word}" is not a flag', "Write `--NAME VALUE`.", code="import.bad_arguments")
            )
        else:
            values[option] = word if values[option] is True else f"{values[option]} {word}"
    return values


def _is_dotted(settings: Settings) -> bool:
    """Return whether a flag has its dotted name, as from release 0.10.2."""
    entries = _load_table().entries
    return any(
        name in entries and entries[name].flag != name and settings.where(name) == f"--{entries[name].flag}"
        for name in settings.values
    )


def _convert_table(settings: Settings) -> Iterator[Outcome]:
    """Yield the lines and the omitted settings that the table alone decides on."""
    if not settings.has("pretrain"):
        fix = "Add `--pretrain FOLDER`, or the id of a model on the hub."
        raise settings.make_error("pretrain", recipe_parts.NO_MODEL, fix, code="import.no_model")
    yield from _load_table().make_outcomes(settings)


def _convert_model(settings: Settings) -> Iterator[Outcome]:
    """Yield the attention and the tokenizer."""
    table = _load_table()
    if _is_dotted(settings) or settings.has("attn_implementation"):
        yield table.make_line(settings, "model.attn_implementation", "attn_implementation")
    elif names := settings.list_enabled(("flash_attn", "packing_samples")):
        yield RecipeLine(("model", "attn_implementation"), "flash_attention_2", names)
    if not settings.get("apply_chat_template") or settings.get("pretrain_mode"):
        note = "OpenRLHF puts no beginning-of-text token before a text."
        yield RecipeLine(("tokenizer", "add_bos_token"), False, (), note)
    if template := settings.get("tokenizer_chat_template"):
        key = ("tokenizer", "chat_template")
        if "{" in template:
            yield CompanionFile("{stem}.jinja", template)
            note = "This file holds the template of the command."
            yield RecipeLine(key, "{stem}.jinja", ("tokenizer_chat_template",), note)
        else:
            yield RecipeLine(key, template, ("tokenizer_chat_template",))
    if settings.get("disable_fast_tokenizer"):
        yield RecipeLine(("tokenizer", "use_fast"), False, ("disable_fast_tokenizer",))


def _convert_lora(settings: Settings) -> Iterator[Outcome]:
    """Yield the sections `lora:` and `quantization:`."""
    table = _load_table()
    if table.get_value(settings, "lora_rank"):
        for line in table.make_lines(settings, "lora"):
            if isinstance(line.value, list) and len(line.value) == 1:  # `all-linear` stands alone
                yield line._replace(value=line.value[0])
            else:
                yield line
    if settings.get("load_in_4bit"):
        bits = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": "bfloat16",
        }
        for key, value in bits.items():
            yield RecipeLine(("quantization", key), value, ("load_in_4bit",))


def _convert_data(settings: Settings) -> Iterator[Outcome]:
    """Yield the training rows, how they become text, and which tokens carry loss."""
    table = _load_table()
    if not settings.has("dataset"):
        fix = "Add `--dataset FILE`, a folder, or the id of a data set on the hub."
        raise settings.make_error("dataset", recipe_parts.NO_ROWS, fix, code="import.no_rows")
    keys, notes = _make_row_format(settings, table)
    weights = _read_weights(settings)
    max_rows = settings.get("max_samples")
    split = table.get_value(settings, "dataset_split")
    first_rows = recipe_parts.take_first_rows(split, max_rows)
    limit = {} if first_rows else {"max_rows": max_rows}
    sources = _make_sources(settings.get("dataset"), first_rows or split, keys=keys | limit, weights=weights)
    if max_rows and not first_rows:
        reason = f"OpenRLHF takes the first {max_rows:,} rows. `max_rows` takes as many at random."
        yield OmittedSetting("max_samples", reason, "rows")
    if weights:
        epoch_note = "trl_sft ends an epoch after as many rows as all sources have."
        reason = f"OpenRLHF draws by `--dataset_probs` until each source is used up. {epoch_note}"
        yield OmittedSetting("dataset_probs", reason, "rows")
    elif settings.has("dataset_probs"):
        yield OmittedSetting("dataset_probs", "There is one data set.")
    if settings.get("pretrain_mode"):
        reason = "OpenRLHF puts no end-of-text token after a text. trl_sft puts one, and trains it."
        yield OmittedSetting("pretrain_mode", reason, "wording")
    names = settings.list_present(
        *("dataset", "dataset_split", "dataset_probs", "max_samples", "input_key", "output_key", "input_template"),
        "apply_chat_template",
    )
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(sources), names, join_sentences(*notes))
    if settings.get("pretrain_mode"):
        yield table.make_line(settings, "train.max_length", "max_len")
        return
    loss_on = "completion"
    if settings.get("apply_chat_template"):
        loss_on = "assistant" if settings.get("multiturn") else "last_turn"
    yield table.make_line(settings, "data.loss_on", "multiturn", value=loss_on)
    length_note = "OpenRLHF drops a row whose prompt is this long. trl_sft counts such rows."
    yield table.make_line(settings, "train.max_length", "max_len", note=length_note)
    overlong_note = "OpenRLHF replaces the last token of a long row with the end-of-text token."
    yield RecipeLine(("data", "overlong"), "truncate_and_end", (), overlong_note)


def _read_weights(settings: Settings) -> list[float]:
    """Return the weights of the sources; none where OpenRLHF does not mix by weight."""
    text = settings.get("dataset_probs", "")
    try:
        weights = [float(weight) for weight in text.split(",") if weight]
        return weights if len(weights) > 1 else []  # one data set is read from its beginning to its end
    except ValueError:
        raise settings.make_error(
            "dataset_probs", f"{text!r}", "Write numbers with commas between them.", code="import.wrong_type"
        ) from None


def _make_sources(paths: str, split: str, *, keys: dict[str, Any], weights: list[float]) -> list[Any]:
    """Return the sources of `PATH` or `PATH@FOLDER`, with commas between them."""
    sources = []
    for number, item in enumerate(paths.split(",")):
        path, _, folder = item.strip().partition("@")
        weight = weights[number] if number < len(weights) else None
        source_keys = {"data_dir": folder, "split": recipe_parts.omit_train_split(split)} | keys | {"weight": weight}
        sources.append(recipe_parts.make_source(path, **source_keys))
    return sources


def _make_row_format(settings: Settings, table: Table) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a source that say how its rows become text, and sentences on what differs."""
    prompt, answer = table.get_value(settings, "input_key"), table.get_value(settings, "output_key")
    if settings.get("pretrain_mode"):
        return {"format": "text", "rename": recipe_parts.make_rename({prompt: "text"})}, []
    if settings.get("apply_chat_template"):
        return _make_chat_format(settings, prompt, answer), []
    if not answer:
        problem = "the flag is missing, and OpenRLHF drops every row without an answer"
        fix = "Add `--output_key COLUMN`, `--apply_chat_template` or `--pretrain_mode`."
        raise settings.make_error("output_key", problem, fix, code="import.unsupported_value")
    for name, column in (("input_key", prompt), ("output_key", answer)):
        if not column.isidentifier():
            problem = f"{column!r}: a wording takes only columns whose name is one word"
            raise settings.make_error(name, problem, "Give the column another name.", code="import.unsupported_value")
    notes = [
        "OpenRLHF removes line breaks at the end of an answer and puts a space before the end-of-text token, so the "
        "completion ends in a space."
    ]
    wording = _make_prompt_wording(settings, table, prompt)
    if "\\n" in wording:
        notes.append("The shell passed the template with a backslash and an n, not with a line break.")
    return {"wording": {"prompt": wording, "completion": f"{{{answer}}} "}}, notes


def _make_chat_format(settings: Settings, prompt: str, answer: str | None) -> dict[str, Any]:
    """Return the keys of a source of chats: one column of messages, or a column for each side."""
    if not answer:
        return {"format": "messages", "rename": recipe_parts.make_rename({prompt: "messages"}), "wording": "chat"}
    if settings.get("multiturn"):
        problem = f"{answer!r} cannot be used with --multiturn"
        fix = "Put the whole chat into one column and name it with `--input_key`."
        raise settings.make_error("output_key", problem, fix, code="import.unsupported_value")
    columns = recipe_parts.make_rename({prompt: "prompt", answer: "completion"})
    return {"format": "prompt_completion", "rename": columns, "wording": "chat"}


def _make_prompt_wording(settings: Settings, table: Table, column: str) -> str:
    """Return the wording of the prompt: OpenRLHF's template with the column in its place."""
    template = table.get_value(settings, "input_template")
    fix = "Write a text with one `{}`."
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise settings.make_error(
            "input_template", f"{template!r}: {error}", fix, code="import.invalid_template"
        ) from None
    if "{}" not in template:
        return f"{{{column}}}"  # OpenRLHF then uses no template
    places = [name for _, name, _, _ in parts if name is not None]
    if places not in ([""], ["0"]):
        raise settings.make_error(
            "input_template", f"{template!r} has {len(places)} places for a prompt", fix, code="import.invalid_template"
        )
    wording = ""
    for text, name, _, _ in parts:
        wording += text.replace("{", "{{").replace("}", "}}")
        wording += f"{{{column}}}" if name is not None else ""
    return wording


def _convert_evaluation(settings: Settings) -> Iterator[Outcome]:
    """Yield the evaluation set and when it is used."""
    table = _load_table()
    if not settings.get("eval_dataset"):
        if settings.has("eval_steps"):
            yield OmittedSetting("eval_steps", "OpenRLHF evaluates nothing without `--eval_dataset`.")
        return
    keys, _ = _make_row_format(settings, table)
    sources = _make_sources(
        settings.get("eval_dataset"), table.get_value(settings, "eval_split"), keys=keys, weights=[]
    )
    names = settings.list_present("eval_dataset", "eval_split")
    yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(sources), names)
    steps = table.get_value(settings, "eval_steps")
    yield table.make_line(settings, "train.eval_strategy", "eval_steps", value="steps" if steps > 0 else "epoch")
    if steps > 0:
        yield table.make_line(settings, "train.eval_steps", "eval_steps")
    yield table.make_line(settings, "train.per_device_eval_batch_size", "micro_train_batch_size")


def _convert_optimizer(settings: Settings) -> Iterator[Outcome]:
    """Yield the schedule of the learning rate and the numbers of AdamW."""
    table = _load_table()
    if table.get_value(settings, "lr_scheduler") == "cosine_with_min_lr":
        rate = {"min_lr_rate": table.get_value(settings, "min_lr_ratio")}
        yield table.make_line(settings, "train.lr_scheduler_kwargs", "min_lr_ratio", value=rate)
    warmup = table.get_value(settings, "lr_warmup_ratio")
    if warmup >= 1:
        raise settings.make_error(
            "lr_warmup_ratio",
            f"{warmup} is not a share of the steps",
            "Write a number below 1.",
            code="import.wrong_type",
        )
    beta1, beta2 = table.get_value(settings, "adam_betas")
    yield table.make_line(settings, "train.adam_beta1", "adam_betas", value=beta1)
    yield table.make_line(settings, "train.adam_beta2", "adam_betas", value=beta2)
    if table.get_value(settings, "optim") != "adam":
        yield OmittedSetting(
            "optim", "trl_sft trains with AdamW, not with Muon. Set `train.optim` to choose another.", "weights"
        )
    elif settings.has("optim"):
        yield OmittedSetting("optim", "AdamW is the default of `train.optim` too.")


def _convert_training(settings: Settings) -> Iterator[Outcome]:
    """Yield batches and gradient checkpointing."""
    table = _load_table()
    yield table.make_line(settings, "run.global_batch_size", "train_batch_size")
    batch, micro_batch = (table.get_value(settings, name) for name in ("train_batch_size", "micro_train_batch_size"))
    if not _is_dotted(settings) and batch > micro_batch:
        reason = (
            "Up to release 0.10 OpenRLHF gives each micro batch of a step the same weight, and so less to each token "
            "of a longer one. trl_sft gives each token the same weight, as later releases do."
        )
        yield OmittedSetting("train_batch_size", reason, "objective")
    drop_note = (
        "OpenRLHF carries the last incomplete batch of an epoch into the next one. trl_sft makes a smaller step of it."
    )
    yield RecipeLine(("train", "dataloader_drop_last"), True, (), drop_note)
    key = f"train.{recipe_parts.get_current_name('gradient_checkpointing')}"
    saves_memory = bool(settings.get("gradient_checkpointing"))
    yield table.make_line(settings, key, "gradient_checkpointing", value=saves_memory)
    if saves_memory:
        name = "gradient_checkpointing_use_reentrant"
        key = f"train.{recipe_parts.get_current_name('gradient_checkpointing_kwargs')}"
        yield table.make_line(settings, key, name, value={"use_reentrant": bool(settings.get(name))})


def _convert_precision(settings: Settings) -> Iterator[Outcome]:
    """Yield the types of weights and arithmetic: `--bf16` in older releases, `--ds.param_dtype` in newer ones."""
    table = _load_table()
    if _is_dotted(settings) or settings.get("param_dtype"):
        if table.get_value(settings, "param_dtype") not in ("bf16", "fp16"):
            problem = f"the value is {settings.get('ds.param_dtype')}"
            raise settings.make_error(
                "param_dtype", problem, "Write `bf16` or `fp16`.", code="import.unsupported_value"
            )
        fp16 = table.get_value(settings, "param_dtype") == "fp16"
        yield table.make_line(settings, "train.bf16", "param_dtype", value=not fp16)
        if fp16:
            yield table.make_line(settings, "train.fp16", "param_dtype", value=True)
        return
    bf16 = bool(settings.get("bf16"))
    yield table.make_line(settings, "train.bf16", "bf16", value=bf16)
    if not bf16:
        note = "Without `--bf16` OpenRLHF trains weights in the type in which they were saved."
        yield RecipeLine(("model", "dtype"), "auto", (), note)


def _convert_checkpoints(settings: Settings) -> Iterator[Outcome]:
    """Yield when checkpoints are written and read."""
    table = _load_table()
    steps = table.get_value(settings, "save_steps")
    if steps > 0:
        yield table.make_line(settings, "train.save_strategy", "save_steps", value="steps")
        yield table.make_line(settings, "train.save_steps", "save_steps")
        yield table.make_line(settings, "train.save_total_limit", "max_ckpt_num")
    else:
        note = "OpenRLHF saves only the trained model."
        yield table.make_line(settings, "train.save_strategy", "save_steps", value="no", note=note)
    if settings.get("load_checkpoint"):
        note = "" if steps > 0 else "There are no checkpoints to resume from, in OpenRLHF either."
        yield table.make_line(settings, "run.resume", "load_checkpoint", value="auto", note=note)


def _convert_trackers(settings: Settings) -> Iterator[Outcome]:
    """Yield the trackers; a key for wandb is never written."""
    trackers = {"use_wandb": "wandb", "use_tensorboard": "tensorboard"}
    names = settings.list_enabled(trackers)
    if not names:
        return
    folder = settings.get("use_tensorboard")
    note = f"Set TENSORBOARD_LOGGING_DIR to the folder {folder} before the command."
    if "use_wandb" in names:
        note = "Set WANDB_API_KEY to the key before the command."
    yield RecipeLine(("train", "report_to"), [trackers[name] for name in names], names, note)


def _convert_launch(settings: Settings) -> Iterator[Outcome]:
    """Yield the section `launch:`."""
    table = _load_table()
    stage = table.get_value(settings, "zero_stage")
    yield table.make_line(settings, "launch.engine", "zero_stage", value=recipe_parts.ZERO_ENGINES.get(stage, stage))


STEPS = (
    _convert_table,
    _convert_model,
    _convert_lora,
    _convert_data,
    _convert_evaluation,
    _convert_optimizer,
    _convert_training,
    _convert_precision,
    _convert_checkpoints,
    _convert_trackers,
    _convert_launch,
)
