"""What the settings of an axolotl file become.

Input: the settings. Output: lines of a recipe, and reasons for the settings that need none. A default of axolotl that
changes the training compared with trl_sft's becomes a line too. Names, defaults and most notes stand in
`axolotl.yaml`, which also names the release; the code here follows its sources.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from trl_sft.importers import recipe_parts, tables
from trl_sft.importers.settings import OmittedSetting, Outcome, RecipeLine, Settings, join_sentences
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths
from trl_sft.recipe.upstream import keys, types
from trl_sft.recipe.yaml_reader import format_value

_SOURCE_KEYS = ("name", "split", "revision")  # keys of a data set that `data.train` has too
# keys of a data set that say how its rows become text, and are read below
_READ_KEYS = {
    *("path", "type", "ds_type", "data_files", "field", "field_messages", "message_property_mappings", "chat_template"),
    *("message_field_role", "message_field_content", "roles_to_train", "train_on_eos", "chat_template_jinja"),
    *("conversation", "trust_remote_code", *_SOURCE_KEYS),
}
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


def _load_table() -> Table:
    """Return the table of axolotl's settings."""
    return tables.load_table("axolotl")


def list_names() -> set[str]:
    """Return every setting that is known here."""
    return set(_load_table().entries)


def convert(settings: Settings) -> Iterator[Outcome]:
    """Yield what becomes of each setting, and the lines for axolotl's defaults.

    Raises:
        RecipeError: A value that a recipe needs is missing or cannot be converted.
    """
    table = _load_table()
    for name in ("rl", "reward_model", "process_reward_model"):
        if settings.get(name):
            problem = f"the value is {format_value(settings.get(name))}; trl_sft does supervised fine-tuning only"
            raise settings.make_error(
                name, problem, "Import a file for supervised fine-tuning.", code="import.other_objective"
            )
    if not settings.has("base_model"):
        raise settings.make_error(
            "base_model", recipe_parts.NO_MODEL, "Set `base_model` to a folder or a hub id.", code="import.no_model"
        )
    yield from table.make_outcomes(settings)
    yield from _convert_model(settings, table)
    yield from _convert_adapter(settings, table)
    yield from _convert_data(settings, table)
    yield from _convert_loss(settings)
    yield from _convert_chat_template(settings, table)
    yield from _convert_optimizer(settings, table)
    yield from _convert_precision(settings)
    yield from _convert_gradient_checkpointing(settings, table)
    yield from _convert_warmup(settings, table)
    yield from _convert_evaluation(settings, table)
    yield from _convert_checkpoints(settings, table)
    if trackers := settings.list_enabled(table.vocabulary["trackers"]):
        values = dict.fromkeys(table.vocabulary["trackers"][name] for name in trackers)
        yield RecipeLine(("train", "report_to"), list(values), trackers)
    fsdp = bool(settings.get("fsdp") or settings.get("fsdp_config"))
    config_note = "These are axolotl's keys. Remove the prefix `fsdp_` from each."
    yield from recipe_parts.convert_launch(settings, fsdp=fsdp, config_note=config_note)


def _convert_model(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the attention and the special tokens."""
    for name in settings.list_enabled(table.vocabulary["attention"]):
        if not settings.has("attn_implementation"):
            yield RecipeLine(("model", "attn_implementation"), table.vocabulary["attention"][name], (name,))
    for token, value in (settings.get("special_tokens") or {}).items():
        if token in _TOKENS:
            yield RecipeLine(("tokenizer", token), value, ("special_tokens",))
        else:
            yield OmittedSetting(
                "special_tokens",
                f"trl_sft does not support `{token}`. Check that your run does not need it.",
                warn=True,
            )


def _convert_adapter(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the sections `lora:` and `quantization:`."""
    adapter = settings.get("adapter")
    if adapter is None:
        return
    if adapter not in ("lora", "qlora"):
        problem = f"the value is {format_value(adapter)}; trl_sft trains no such adapter"
        raise settings.make_error("adapter", problem, "Write `lora` or `qlora`.", code="import.unsupported_value")
    for line in table.make_lines(settings, "lora"):
        if line.value is not False and line.value != []:
            yield line._replace(names=(*line.names, "adapter"))
    modules = settings.get("lora_target_modules")
    if settings.get("lora_target_linear"):
        modules_note = "The layers of `lora_target_modules` are among them." if modules else ""
        note = join_sentences("These are all linear layers except the head.", modules_note)
        names = settings.list_present("lora_target_linear", "lora_target_modules")
        yield RecipeLine(("lora", "target_modules"), "all-linear", names, note)
    elif modules:
        yield RecipeLine(("lora", "target_modules"), modules, ("lora_target_modules",))
    switch = "load_in_4bit" if adapter == "qlora" else "load_in_8bit"
    if not settings.get(switch):
        return
    yield RecipeLine(("quantization", switch), True, (switch, "adapter"))
    if adapter == "qlora":
        defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        names = settings.list_enabled(["bnb_config_kwargs"])
        for key, value in (defaults | (settings.get("bnb_config_kwargs") or {})).items():
            yield RecipeLine(("quantization", key), value, names, table.default_note)


def _convert_data(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the training rows, the evaluation set, and what happens to long rows."""
    name, entries = _find_datasets(settings)
    notes: list[str] = []
    sources = [_make_source(settings, name, entry, notes=notes) for entry in entries]
    if name == "pretraining_dataset":
        sources = [source | {"streaming": True} if isinstance(source, dict) else source for source in sources]
    note = join_sentences(*notes)
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(sources), (name, "streaming"), note)
    if settings.get("test_datasets"):
        entries = _list_entries(settings.get("test_datasets"))
        sources = [_make_source(settings, "test_datasets", entry, notes=[]) for entry in entries]
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(sources), ("test_datasets",))
    yield from recipe_parts.convert_eval_fraction(settings, "val_set_size")
    word = table.vocabulary["overlong"].get(settings.get("excess_length_strategy", "drop"))
    names = settings.list_present("excess_length_strategy")
    yield RecipeLine(("data", "overlong"), word, names, "" if names else table.default_note)


def _find_datasets(settings: Settings) -> tuple[str, list[dict[str, Any]]]:
    """Return the setting that names the training rows, and its data sets."""
    for name in ("datasets", "pretraining_dataset"):
        if settings.get(name):
            return name, _list_entries(settings.get(name))
    fix = "Add `datasets: [{path: FILE or HUB ID, type: chat_template}]`."
    raise settings.make_error("datasets", recipe_parts.NO_ROWS, fix, code="import.no_rows")


def _list_entries(value: Any) -> list[dict[str, Any]]:
    """Return data sets as a list of mappings: axolotl takes a list, a single mapping, or a path."""
    entries = value if isinstance(value, list) else [value]
    return [entry if isinstance(entry, dict) else {"path": str(entry), "type": "pretrain"} for entry in entries]


def _make_source(settings: Settings, name: str, entry: dict[str, Any], *, notes: list[str]) -> Any:
    """Return one source of `data.train`; `notes` takes sentences on what differs."""
    path = entry.get("path")
    if not isinstance(path, str):
        raise settings.make_error(
            name, "a data set has no path", "Set its `path` to a file, a folder or a hub id.", code="import.no_rows"
        )
    path = recipe_parts.resolve_data_files(path, entry.get("data_files"), notes)
    unsupported = [key for key in sorted(set(entry) - _READ_KEYS) if entry[key] is not None]
    notes += [f"trl_sft does not support `{key}` of {path}." for key in unsupported]
    source_keys = {key: entry.get(key) for key in _SOURCE_KEYS}
    source_keys["split"] = recipe_parts.omit_train_split(source_keys["split"])
    return recipe_parts.make_source(path, **source_keys, **_make_row_format(entry, notes))


def _make_row_format(entry: dict[str, Any], notes: list[str]) -> dict[str, Any]:
    """Return the keys of a source that say how its rows become text."""
    kind = entry.get("type")
    if isinstance(kind, dict):
        return {"wording": _make_wording(kind, notes)}
    word = str(kind or "").partition(":")[0]
    if word in ("chat_template", "sharegpt") or (word == "" and entry.get("field_messages")):
        return _make_chat_format(entry, word)
    if word in ("completion", "pretrain"):
        column = entry.get("field") or entry.get("text_column") or "text"
        if word == "completion":
            notes.append(
                "axolotl splits a long text into rows of sequence_len tokens. trl_sft follows `data.overlong`."
            )
        return {"format": "text", "rename": recipe_parts.make_rename({column: "text"})}
    if word == "alpaca":
        notes.append("axolotl breaks the line after `### Response:`. The wording alpaca does not.")
        return {"format": "alpaca", "wording": "alpaca"}
    notes.append(f"axolotl has its own text for rows of type {kind}. Check `wording` with `preview` before you train.")
    return {"format": "question_answer" if word == "alpaca_chat.load_qa" else ""}


def _make_chat_format(entry: dict[str, Any], word: str) -> dict[str, Any]:
    """Return the keys of a source of chats, whose messages have role and content, or from and value."""
    mapping = entry.get("message_property_mappings") or {}
    role = mapping.get("role", entry.get("message_field_role") or ("from" if word == "sharegpt" else "role"))
    column = entry.get("field_messages") or ("conversations" if word == "sharegpt" else "messages")
    row_format, name = ("sharegpt", "conversations") if role == "from" else ("messages", "messages")
    return {"format": row_format, "wording": "chat", "rename": recipe_parts.make_rename({column: name})}


def _make_wording(kind: dict[str, Any], notes: list[str]) -> dict[str, str]:
    """Return the wording of a type that the file itself defines."""
    columns = {name: kind.get(f"field_{name}") or name for name in ("instruction", "input", "output")}
    prompt = kind.get("format") or "{instruction} {input} "
    if kind.get("no_input_format") and "{input}" in prompt:
        notes.append("trl_sft does not support `no_input_format`. Rows without an input get the same wording.")
    for name in ("instruction", "input"):
        prompt = prompt.replace(f"{{{name}}}", f"{{{columns[name]}}}")
    if kind.get("system_prompt"):
        system = str(kind["system_prompt"]).replace("{", "{{").replace("}", "}}")
        prompt = (kind.get("system_format") or "{system}").replace("{system}", system) + prompt
    return {"prompt": prompt, "completion": f"{{{columns['output']}}}"}


def _convert_loss(settings: Settings) -> Iterator[Outcome]:
    """Yield which tokens carry loss."""
    if settings.get("train_on_inputs"):
        yield RecipeLine(("data", "loss_on"), "all", ("train_on_inputs",))
    elif settings.has("train_on_inputs"):
        yield OmittedSetting("train_on_inputs", "The value false is the default: only answers carry loss.")
    for entry in _find_datasets(settings)[1]:
        roles, eos = entry.get("roles_to_train"), entry.get("train_on_eos")
        if roles not in (None, ["assistant"], ["gpt"]):
            reason = "trl_sft trains the turns of the assistant. Set `data.loss_on: all` to train all turns."
            yield OmittedSetting("roles_to_train", f"The value was {format_value(roles)}. {reason}", warn=True)
        if eos not in (None, "turn"):
            reason = "trl_sft trains the end-of-turn token of every trained turn. Check the tokens with `preview`."
            yield OmittedSetting("train_on_eos", f"The value was {format_value(eos)}. {reason}", warn=True)


def _convert_chat_template(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the chat template: that of the file, or else that of its first data set that has one."""
    names = settings.list_enabled(["chat_template", "chat_template_jinja"])
    template_settings = settings.values
    if not names:
        names = ("datasets",)
        entries = _find_datasets(settings)[1]
        template_settings = {}
        for entry in reversed(entries):
            if entry.get("chat_template") or entry.get("chat_template_jinja"):
                template_settings = entry
    template, jinja = template_settings.get("chat_template"), template_settings.get("chat_template_jinja")
    key = ("tokenizer", "chat_template")
    if isinstance(jinja, str) and jinja and "{" not in jinja:
        yield RecipeLine(key, jinja, names)
    elif jinja:
        reason = "Write the template to a file and set `tokenizer.chat_template: FILE.jinja`."
        yield OmittedSetting("chat_template_jinja", reason, warn=True)
    elif template == "tokenizer_default":
        yield OmittedSetting("chat_template", "The template of the tokenizer is the default.")
    elif template:
        base_name = str(template).removeprefix("tokenizer_default_fallback_")
        name = table.vocabulary["templates"].get(base_name, base_name)
        if name in paths.list_templates():
            note = "" if base_name == template else "axolotl uses it only if the tokenizer has no template."
            yield RecipeLine(key, name, names, note)
        else:
            problem = f"trl_sft has no template {format_value(template)} and uses the tokenizer's."
            yield OmittedSetting("chat_template", f"{problem} Compare the two with `preview`.", warn=True)


def _convert_optimizer(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield packing, gradient accumulation, the schedule and the optimizer."""
    note = "Packed documents do not attend to each other, as in axolotl." if settings.get("sample_packing") else ""
    yield table.make_line(settings, "train.packing", "sample_packing", note=note)
    key = ("train", "gradient_accumulation_steps")
    if settings.has("gradient_accumulation_steps"):
        yield RecipeLine(key, settings.get("gradient_accumulation_steps"), ("gradient_accumulation_steps",))
    elif settings.get("batch_size"):
        steps = settings.get("batch_size") // settings.get("micro_batch_size", 1)
        yield RecipeLine(key, steps, ("batch_size",), "This is batch_size / micro_batch_size.")
    else:
        yield RecipeLine(key, 1, (), table.default_note)
    schedule = settings.get("lr_scheduler")
    if schedule in ("one_cycle", "rex"):
        reason = f"trl_sft does not support {schedule} and uses cosine."
        yield RecipeLine(("train", "lr_scheduler_type"), "cosine", (), reason)
        reason += " Set `train.lr_scheduler_type` to choose another schedule."
        yield OmittedSetting("lr_scheduler", reason, warn=True)
    else:
        yield table.make_line(settings, "train.lr_scheduler_type", "lr_scheduler")
    if types.accepts(keys.get_fields("train")["optim"], table.get_value(settings, "optimizer")):
        yield table.make_line(settings, "train.optim", "optimizer")
    else:
        reason = (
            "trl_sft does not have this optimizer and trains with the default. Set `train.optim` to choose another."
        )
        yield OmittedSetting("optimizer", reason, warn=True)


def _convert_precision(settings: Settings) -> Iterator[Outcome]:
    """Yield the types of weights and arithmetic."""
    bf16 = settings.get("bf16", settings.get("bfloat16", "auto"))
    names = settings.list_present("bf16", "bfloat16")
    fp16 = settings.get("fp16", settings.get("float16"))
    note = "axolotl loads all weights in bfloat16. TRL trains float32 weights with `bf16: true`."
    if fp16 or bf16 not in (True, "full", "auto"):
        yield RecipeLine(("train", "bf16"), False, names)
    elif bf16 == "auto":
        auto_note = "TRL's default is bf16 where the machine supports it, as with `bf16: auto`."
        yield RecipeLine(("model", "dtype"), "bfloat16", names, join_sentences(note, auto_note))
    else:
        yield RecipeLine(("train", "bf16"), True, names)
        yield RecipeLine(("model", "dtype"), "bfloat16", names, note)
    if fp16:
        yield RecipeLine(("train", "fp16"), True, ("fp16", "float16"))
    if settings.get("tf32") not in (None, "auto"):
        yield RecipeLine(("train", "tf32"), settings.get("tf32"), ("tf32",))


def _convert_gradient_checkpointing(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield gradient checkpointing and its options."""
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


def _convert_warmup(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the warm-up, in steps or as a share of all steps."""
    if settings.has("warmup_steps"):
        yield table.make_line(settings, "train.warmup_steps", "warmup_steps")
        return
    limit_note = "" if settings.has("warmup_ratio") else "axolotl takes at most 100 steps."
    note = join_sentences("A value below 1 is a share of all steps.", limit_note)
    yield table.make_line(settings, "train.warmup_steps", "warmup_ratio", note=note)


def _convert_evaluation(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield when the evaluation set is used."""
    if not (settings.get("test_datasets") or 0 < settings.get("val_set_size", 0) < 1):
        return
    if line := _convert_per_epoch(settings, table, "evals_per_epoch"):
        yield line
        yield RecipeLine(("train", "eval_strategy"), "steps", ("evals_per_epoch",))
    elif settings.get("eval_steps"):
        yield table.make_line(settings, "train.eval_steps", "eval_steps")
        yield RecipeLine(("train", "eval_strategy"), "steps", ("eval_steps",))
    elif strategy := settings.get("eval_strategy", settings.get("evaluation_strategy")):
        names = settings.list_enabled(["eval_strategy", "evaluation_strategy"])
        yield RecipeLine(("train", "eval_strategy"), strategy, names)


def _convert_checkpoints(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield when checkpoints are written and read."""
    if line := _convert_per_epoch(settings, table, "saves_per_epoch"):
        yield line
        yield RecipeLine(("train", "save_strategy"), "steps", ("saves_per_epoch",))
    elif settings.get("save_steps"):
        yield table.make_line(settings, "train.save_steps", "save_steps")
        yield RecipeLine(("train", "save_strategy"), "steps", ("save_steps",))
    elif table.get_value(settings, "save_strategy"):
        yield table.make_line(settings, "train.save_strategy", "save_strategy")
    names = settings.list_enabled(["resume_from_checkpoint", "auto_resume_from_checkpoints"])
    if names:
        yield RecipeLine(("run", "resume"), settings.get("resume_from_checkpoint") or "auto", names)


def _convert_per_epoch(settings: Settings, table: Table, name: str) -> RecipeLine | None:
    """Return the line for a number of evaluations or checkpoints in an epoch; None = one at the end of all steps."""
    if not settings.get(name):
        return None
    share = 1 / (settings.get(name) * table.get_value(settings, "num_epochs"))
    if share >= 1:
        return None
    key = {"evals_per_epoch": "eval_steps", "saves_per_epoch": "save_steps"}[name]
    note = f"This is {settings.get(name)} times in an epoch, as a share of all steps."
    return RecipeLine(("train", key), round(share, 6), (name,), note)
