"""What the settings of an axolotl file become.

Input: the settings. Output: lines of a recipe, and reasons for the settings that need none. A default of axolotl that
changes the training compared with trl_sft's becomes a line too. Names, defaults and most notes stand in
`axolotl.yaml`, which also names the release; the code here follows its sources. Deliberately not here: what one data
set becomes (`axolotl_rows`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from trl_sft.importers import axolotl_rows, axolotl_training, recipe_parts, tables
from trl_sft.importers.row_functions import RowFunction, make_file
from trl_sft.importers.settings import (
    CompanionFile,
    OmittedSetting,
    Outcome,
    RecipeLine,
    Settings,
    join_sentences,
)
from trl_sft.importers.tables import Table
from trl_sft.recipe import paths
from trl_sft.recipe.yaml_reader import format_value

# settings that only an axolotl file has; the first three stand in nearly every one
MARKS = ("base_model", "micro_batch_size", "sequence_len", "sample_packing", "datasets", "num_epochs", "val_set_size")
_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")
_LIGER = (
    *("liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation", "liger_swiglu"),
    *("liger_cross_entropy", "liger_fused_linear_cross_entropy"),
)


def _load_table() -> Table:
    """Return the table of axolotl's settings."""
    return tables.load_table("axolotl")


def list_names() -> set[str]:
    """Return every setting that is known here."""
    return set(_load_table().entries)


def _convert_table(settings: Settings) -> Iterator[Outcome]:
    """Yield the lines and the omitted settings that the table alone decides on."""
    if not settings.has("base_model"):
        fix = "Set `base_model` to a folder or a hub id."
        raise settings.make_error("base_model", recipe_parts.NO_MODEL, fix, code="import.no_model")
    yield from _load_table().make_outcomes(settings)


def _convert_model(settings: Settings) -> Iterator[Outcome]:
    """Yield the class of the model, the attention and the special tokens."""
    table = _load_table()
    for name in settings.list_present("model_type", "type_of_model"):
        if "Classification" in settings.get(name):
            problem = f"the value is {format_value(settings.get(name))}; trl_sft trains models that write text"
            fix = "Import a file for supervised fine-tuning on text."
            raise settings.make_error(name, problem, fix, code=tables.OTHER_OBJECTIVE)
        yield OmittedSetting(name, "The configuration of the model has this value.")
    for name in settings.list_enabled(table.vocabulary["attention"]):
        if not settings.has("attn_implementation"):
            yield RecipeLine(("model", "attn_implementation"), table.vocabulary["attention"][name], (name,))
    yield from _convert_tokens(settings, table)


def _convert_tokens(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the special tokens and new ones; in early releases `tokens` was what `special_tokens` is today."""
    extra: list[Any] = []
    names: list[str] = []
    for name in settings.list_enabled(["special_tokens", "tokens"]):
        value = settings.get(name)
        if isinstance(value, list):
            extra += value
            names.append(name)
            continue
        yield from table.audit("special_tokens", settings, name)
        for token in _TOKENS:
            if value.get(token) is not None:
                yield RecipeLine(("tokenizer", token), value[token], (name,))
        if value.get("additional_special_tokens"):
            extra += value["additional_special_tokens"]
            names.append(name)
    if extra:
        yield RecipeLine(("tokenizer", "extra_special_tokens"), extra, tuple(names))


def _convert_plugins(settings: Settings) -> Iterator[Outcome]:
    """Yield what becomes of the plugins, and of Liger's switches."""
    kinds = _load_table().vocabulary["plugins"]
    for number, plugin in enumerate(settings.get("plugins", [])):
        kind = kinds.get(str(plugin).rpartition(".")[2].lower(), "")
        if kind == "refused":
            problem = (
                f"the value is {format_value(plugin)}; trl_sft trains with the loss of supervised fine-tuning only"
            )
            fix = "Import a file for supervised fine-tuning on text."
            raise settings.make_error("plugins", problem, fix, code=tables.OTHER_OBJECTIVE, path=(number,))
        if kind == "liger":
            reason = "`train.use_liger_kernel` takes its place."
        elif kind:
            reason = "It changes how fast a step is, or what is logged, and not what is trained."
        else:
            reason = "trl_sft does not know this plugin. Check that your run does not need it."
        yield OmittedSetting("plugins", reason, "" if kind else "unknown", (number,))
    names = settings.list_enabled(_LIGER)
    if names:
        note = "TRL applies all of Liger's kernels that the model has; the result is the same with each of them."
        yield RecipeLine(("train", "use_liger_kernel"), True, names, note)
    for name in settings.list_present(*_LIGER):
        reason = "`train.use_liger_kernel` has it." if settings.get(name) else tables.OFF
        yield OmittedSetting(name, reason)


def _convert_adapter(settings: Settings) -> Iterator[Outcome]:
    """Yield the sections `lora:` and `quantization:`."""
    table = _load_table()
    adapter = settings.get("adapter")
    if adapter is None:
        yield from _omit_adapter(settings, table)
        return
    if adapter not in ("lora", "qlora"):
        problem = f"the value is {format_value(adapter)}; trl_sft trains no such adapter"
        raise settings.make_error("adapter", problem, "Write `lora` or `qlora`.", code="import.unsupported_value")
    for line in table.make_lines(settings, "lora"):
        if line.value is not False and line.value != []:
            yield line._replace(names=(*line.names, "adapter"))
        else:
            yield OmittedSetting(line.names[0], tables.OFF)
    yield from _convert_target_modules(settings)
    yield from _convert_quantization(settings, table, adapter)


def _convert_quantization(settings: Settings, table: Table, adapter: str) -> Iterator[Outcome]:
    """Yield the section `quantization:` for the frozen weights below an adapter."""
    switch = "load_in_4bit" if adapter == "qlora" else "load_in_8bit"
    for name in ("load_in_4bit", "load_in_8bit"):
        if settings.has(name) and (name != switch or not settings.get(name)):
            reason = f"With `adapter: {adapter}` axolotl takes only `{switch}`."
            yield OmittedSetting(name, reason if settings.get(name) else tables.OFF)
    if not settings.get(switch):
        if settings.has("bnb_config_kwargs"):
            yield OmittedSetting("bnb_config_kwargs", f"It has no effect without `{switch}: true`.")
        return
    yield RecipeLine(("quantization", switch), True, (switch, "adapter"))
    skipped = _list_unquantized_layers(str(settings.get("base_model")), switch)
    if skipped and "llm_int8_skip_modules" not in settings.get("bnb_config_kwargs", {}):
        note = "axolotl does not quantize these layers of this kind of model."
        yield RecipeLine(("quantization", "llm_int8_skip_modules"), skipped, (), note)
    if adapter == "qlora":
        yield from _convert_4bit(settings, table)
    elif settings.has("bnb_config_kwargs"):
        for key, value in settings.get("bnb_config_kwargs").items():
            yield RecipeLine(("quantization", key), value, ("bnb_config_kwargs",))


def _list_unquantized_layers(model: str, switch: str) -> list[str]:
    """Return the layers that axolotl leaves as they are; the kind of a model is read off its name here."""
    name = model.lower()
    if re.search(r"falcon[-_]?h1", name):
        return ["out_proj"]
    return ["mamba"] if "jamba" in name and switch == "load_in_8bit" else []


def _omit_adapter(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the settings of an adapter in a file that trains all weights."""
    reason = "Without `adapter` axolotl trains all weights, and reads none of the settings of an adapter."
    names = [name for name, _ in table.list_group("lora")]
    for name in settings.list_present(*names, "lora_target_modules", "lora_target_linear", "bnb_config_kwargs"):
        yield OmittedSetting(name, reason)
    for name in settings.list_present("load_in_4bit", "load_in_8bit"):
        if settings.get(name):
            reason = "axolotl quantizes only the frozen weights below an adapter, and there is none here."
            yield OmittedSetting(name, reason, "weights")
        else:
            yield OmittedSetting(name, tables.OFF)


def _convert_4bit(settings: Settings, table: Table) -> Iterator[Outcome]:
    """Yield the options of weights with 4 bits."""
    defaults = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    options = settings.get("bnb_config_kwargs") or {}
    for key, value in (defaults | options).items():
        if key in options:
            yield RecipeLine(("quantization", key), value, ("bnb_config_kwargs",))
        else:
            yield RecipeLine(("quantization", key), value, (), table.default_note)


def _convert_target_modules(settings: Settings) -> Iterator[Outcome]:
    """Yield the layers that the adapter is for."""
    modules = settings.get("lora_target_modules")
    if settings.get("lora_target_linear"):
        modules_note = "The layers of `lora_target_modules` are among them." if modules else ""
        note = join_sentences("These are all linear layers except the head.", modules_note)
        yield RecipeLine(("lora", "target_modules"), "all-linear", ("lora_target_linear",), note)
        others = _list_other_layers(modules)
        if others:
            reason = (
                f"axolotl trains {', '.join(others)} too, and `all-linear` does not have them. Write the names of all "
                "layers to `lora.target_modules`."
            )
            yield OmittedSetting("lora_target_modules", reason, "weights")
        elif modules:
            yield OmittedSetting("lora_target_modules", "`lora_target_linear` has these layers too.")
    elif modules:
        yield RecipeLine(("lora", "target_modules"), modules, ("lora_target_modules",))


def _list_other_layers(modules: Any) -> list[str]:
    """Return the layers that peft's `all-linear` leaves out: heads and embeddings."""
    names = modules if isinstance(modules, list) else [modules] if modules else []
    return [str(name) for name in names if re.search(r"head|embed|wte|wpe", str(name))]


def _convert_data(settings: Settings) -> Iterator[Outcome]:
    """Yield the training rows, the evaluation set, and what happens to long rows."""
    table = _load_table()
    name, entries = _find_datasets(settings)
    functions: list[RowFunction] = []
    outcomes: list[Outcome] = []
    sources = [
        source
        for number, entry in enumerate(entries)
        for source in axolotl_rows.make_sources(
            settings, table, (name, number), entry=entry, functions=functions, outcomes=outcomes
        )
    ]
    if name == "pretraining_dataset" or settings.get("streaming"):
        sources = [source | {"streaming": True} if isinstance(source, dict) else source for source in sources]
    names = (name, "streaming") if settings.has("streaming") else (name,)
    if name == "pretraining_dataset" and settings.has("streaming"):
        yield OmittedSetting("streaming", "axolotl streams a `pretraining_dataset` in any case.")
    yield RecipeLine(("data", "train"), recipe_parts.unwrap_single(sources), names)
    if settings.get("test_datasets"):
        test_entries = _list_entries(settings.get("test_datasets"))
        sources = [
            source
            for number, entry in enumerate(test_entries)
            for source in axolotl_rows.make_sources(
                settings, table, ("test_datasets", number), entry=entry, functions=functions, outcomes=outcomes
            )
        ]
        yield RecipeLine(("data", "eval"), recipe_parts.unwrap_single(sources), ("test_datasets",))
        if settings.get("val_set_size"):
            yield OmittedSetting("val_set_size", "axolotl does not read it beside `test_datasets`.")
    elif settings.has("val_set_size"):
        yield from recipe_parts.convert_eval_fraction("val_set_size", settings.get("val_set_size"))
    yield from outcomes
    if functions:
        yield make_file(functions, "axolotl")
    if name == "datasets" and settings.get("pretraining_dataset"):
        yield OmittedSetting("pretraining_dataset", "The recipe trains on the rows of `datasets`.", "rows")


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
    return [entry if isinstance(entry, dict) else {"path": entry, "type": "pretrain"} for entry in entries]


def _convert_long_rows(settings: Settings) -> Iterator[Outcome]:
    """Yield packing and what happens to long rows: axolotl splits texts and drops, or cuts, all other rows."""
    table = _load_table()
    name, entries = _find_datasets(settings)
    texts = [axolotl_rows.is_text(entry) or name == "pretraining_dataset" for entry in entries]
    strategy = settings.get("excess_length_strategy", "drop")
    names = settings.list_present("excess_length_strategy")
    packs = bool(settings.get("sample_packing"))
    if all(texts):
        if names:
            yield OmittedSetting("excess_length_strategy", "axolotl splits a long text, so no row is too long.")
        note = "axolotl splits a long text into rows of `sequence_len` tokens and trains all of them."
        yield RecipeLine(("train", "packing"), True, settings.list_present("sample_packing"), note)
        yield RecipeLine(("train", "packing_strategy"), "bfd_split", ())
        if not packs:
            reason = (
                "axolotl makes each piece of a text a row. trl_sft splits texts only while it packs, so a row holds as "
                "many pieces as fit, and a step has more tokens."
            )
            yield OmittedSetting("sample_packing", reason, "rows")
        return
    yield table.make_line(settings, "train.packing", "sample_packing")
    if packs and axolotl_training.find_attention(settings) not in table.vocabulary["packing_attention"]:
        reason = (
            "Without an attention that can keep them apart, axolotl lets the rows of a pack attend to each other. In "
            "trl_sft they do not."
        )
        yield OmittedSetting("sample_packing", reason, "rows")
    word = table.vocabulary["overlong"].get(strategy)
    if word is None:
        words = ", ".join(f"`{word}`" for word in table.vocabulary["overlong"])
        problem = f"the value is {format_value(strategy)}"
        fix = f"Write one of {words}."
        raise settings.make_error("excess_length_strategy", problem, fix, code="import.unsupported_value")
    yield RecipeLine(("data", "overlong"), word, names, "" if names else table.default_note)
    if any(texts):
        reason = (
            "axolotl splits long texts into rows of `sequence_len` tokens. Beside rows of another type trl_sft does "
            f"not split them: `data.overlong: {word}` applies to them too. Split them in the file."
        )
        yield OmittedSetting(name, reason, "rows", (texts.index(True), "type"))


def _convert_loss(settings: Settings) -> Iterator[Outcome]:
    """Yield which tokens carry loss: that of the file, or that on which all of its data sets agree."""
    name, entries = _find_datasets(settings)
    is_all = bool(settings.get("train_on_inputs"))
    words = set()
    for number, entry in enumerate(entries):
        if str(entry.get("type") or "").partition(":")[0] not in ("chat_template", "sharegpt", ""):
            words.add("all" if is_all else "")
            continue
        word, outcomes = _read_loss(name, number, entry, is_all=is_all)
        words.add(word)
        yield from outcomes
    if settings.has("train_on_inputs") and not is_all:
        yield OmittedSetting("train_on_inputs", "Only answers carry loss, as in a recipe.")
    chosen = words.pop() if len(words) == 1 else ""
    names = ("train_on_inputs",) if is_all else (name,)
    if chosen:
        yield RecipeLine(("data", "loss_on"), chosen, names)
    elif words:
        reason = "The data sets differ in which tokens carry loss, and `data.loss_on` is one word for all of them."
        if "" in words:
            reason = (
                "axolotl trains prompts as text beside chats. The rows of a recipe are one or the other. Set `wording` "
                "of the sources so that they agree, and `data.loss_on`."
            )
            yield OmittedSetting(name, reason, "wording")
            return
        yield OmittedSetting(name, reason, "mask")


def _read_loss(name: str, number: int, entry: dict[str, Any], *, is_all: bool) -> tuple[str, list[Outcome]]:
    """Return `data.loss_on` for a data set of chats, and what that word does not say."""
    roles = entry.get("roles_to_train")
    outcomes: list[Outcome] = []
    roles = [roles] if isinstance(roles, str) else roles
    word = "all" if is_all else "assistant"
    if is_all:
        reason = (
            "axolotl trains the texts of all turns. `loss_on: all` trains the template's own words between them too."
        )
        outcomes.append(OmittedSetting("train_on_inputs", reason, "mask"))
        if roles is not None:
            reason = "`train_on_inputs` trains the turns of all roles."
            outcomes.append(OmittedSetting(name, reason, "", (number, "roles_to_train")))
    elif roles in (["assistant"], ["gpt"]):
        reason = "Each turn of the assistant carries loss."
        outcomes.append(OmittedSetting(name, reason, "", (number, "roles_to_train")))
    elif roles is not None:
        reason = (
            "`data.loss_on` can be `assistant` (each of its turns) or `all` (the template's own words too), and not "
            "these roles. The turns of the assistant carry loss."
        )
        outcomes.append(OmittedSetting(name, reason, "mask", (number, "roles_to_train")))
    for key in ("train_on_eos", "train_on_eot"):
        eos = entry.get(key)
        if eos is None:
            continue
        if eos == "turn":
            reason, affects = "The token that ends a trained turn carries loss.", ""
        else:
            reason = "The token that ends a turn carries loss where the turn does. Check the tokens with `preview`."
            affects = "mask"
        outcomes.append(OmittedSetting(name, reason, affects, (number, key)))
    return word, outcomes


def _convert_chat_template(settings: Settings) -> Iterator[Outcome]:
    """Yield the chat template: that of the file, or else that of its first data set that has one."""
    name, entries = _find_datasets(settings)
    top = {key: settings.get(key) for key in ("chat_template", "chat_template_jinja") if settings.get(key)}
    chosen: dict[str, Any] = {}
    for number, entry in enumerate(entries):
        if str(entry.get("type") or "").partition(":")[0] not in ("chat_template", "sharegpt", ""):
            continue
        own = {key: entry[key] for key in ("chat_template", "chat_template_jinja") if entry.get(key)}
        if entry.get("conversation"):
            own.setdefault("chat_template", entry["conversation"])
        if not own:
            continue
        first = chosen or top
        if not first:
            chosen = own
            yield from _make_template(own, (name,), [(number, key) for key in entry if key in (*own, "conversation")])
        elif own != first:
            for key in ("chat_template", "chat_template_jinja", "conversation"):
                if entry.get(key):
                    reason = "A recipe has one chat template for all rows, and this data set has another."
                    yield OmittedSetting(name, reason, "wording", (number, key))
        else:
            for key in own:
                yield OmittedSetting(name, "The recipe has this template.", "", (number, key))
    if top:
        yield from _make_template(top, tuple(top), [])


def _make_template(
    template: dict[str, Any], names: tuple[str, ...], places: list[tuple[str | int, ...]]
) -> Iterator[Outcome]:
    """Yield the line, or the file, of one chat template; `places` lead to its keys inside a data set."""
    key = ("tokenizer", "chat_template")
    jinja, word = template.get("chat_template_jinja"), str(template.get("chat_template", "jinja"))
    place = places[0] if places else ()
    if jinja and word != "jinja":
        yield OmittedSetting(names[-1], f"axolotl uses `chat_template: {word}`.", "", place)
    elif jinja and ("{" in jinja or "\n" in jinja):
        yield CompanionFile("{stem}.jinja", jinja)
        yield RecipeLine(key, "{stem}.jinja", names, "This file holds the template of the settings.")
        return
    elif jinja:
        yield RecipeLine(key, jinja, names)
        return
    if word == "tokenizer_default":
        yield OmittedSetting(names[0], "The template of the tokenizer is the default.", "", place)
        return
    base_name = word.removeprefix("tokenizer_default_fallback_")
    name = _load_table().vocabulary["templates"].get(base_name, "")
    if base_name != word:
        reason = "axolotl uses it only if the tokenizer has no template. Set `tokenizer.chat_template` in that case."
        yield OmittedSetting(names[0], reason, "", place)
    elif name in paths.list_templates():
        yield RecipeLine(key, name, names)
        differences = _load_table().vocabulary["template_differences"]
        yield from recipe_parts.explain_template(names[0], word, differences, path=place)
        if places:
            yield OmittedSetting(names[0], f"It is `tokenizer.chat_template: {name}`.", "", place)
    else:
        problem = f"trl_sft has no template {format_value(word)} and uses the tokenizer's."
        yield OmittedSetting(names[0], f"{problem} Compare the two with `preview`.", "wording", place)


STEPS = (
    _convert_table,
    _convert_model,
    _convert_plugins,
    _convert_adapter,
    _convert_data,
    _convert_long_rows,
    _convert_loss,
    _convert_chat_template,
    *axolotl_training.STEPS,
)
