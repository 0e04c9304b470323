"""Every key of a section and of a source with its type, as the installed owners declare it.

In: a section. Out: fields. Here stands only where upstream keeps what a type does not show; what it
is, is read there. Deliberately absent: mappings under a key (`nested`), old names (`old_names`).
"""

from __future__ import annotations

import ast
import functools

from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import source as upstream_source
from trl_sft.recipe.upstream import types
from trl_sft.recipe.upstream.fields import Field, WordList

GENERATION = "evaluate.generation"
SOURCE = "data.*"
_QUANTIZATION = sections.OWNERS["quantization"][1]
_GENERATION_CHECK = sections.GENERATION[1].replace("__init__", "validate")

# Words that a key takes and its type does not show, by where upstream lists them.
WORDS: dict[tuple[str, str], WordList] = {
    ("model", "attn_implementation"): WordList(
        ("transformers.modeling_utils:AttentionInterface._global_mapping",),
        also=("eager",),
        other=r"[^/:]+/[^/:]+(@[^/:]+)?(:[^/:]+)?",  # transformers.integrations.hub_kernels.is_kernel
        as_written="OWNER/KERNEL of the hub",
    ),
    # The check of TRL, which loads the model; its own default is float32.
    ("model", "dtype"): WordList(("trl.trainer.utils:create_model_from_path",), compared="dtype", also=("auto",)),
    ("model", "experts_implementation"): WordList(
        (
            "transformers.integrations.moe:ExpertsInterface._global_mapping",
            "transformers.integrations.finegrained_fp8:FP8ExpertsInterface._global_mapping",
        ),
        also=("eager",),
    ),
    ("quantization", "bnb_4bit_compute_dtype"): WordList(("torch._C:dtype",), declared=True),
    ("quantization", "bnb_4bit_quant_storage"): WordList((_QUANTIZATION,), compared="bnb_4bit_quant_storage"),
    ("train", "debug"): WordList(("transformers.debug_utils:DebugOption",), several=True),
    ("train", "include_num_input_tokens_seen"): WordList(
        ("transformers.training_args:TrainingArguments",), quoted="include_num_input_tokens_seen"
    ),
    ("train", "report_to"): WordList(
        ("transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK",), also=("all", "none")
    ),
    ("train", "torch_compile_backend"): WordList(("accelerate.utils.dataclasses:DynamoBackend",), lower=True),
    ("train", "torch_compile_mode"): WordList(("torch._inductor:list_mode_options",)),
    (GENERATION, "cache_implementation"): WordList((_GENERATION_CHECK,), compared="self.cache_implementation"),
    (GENERATION, "early_stopping"): WordList((_GENERATION_CHECK,), compared="self.early_stopping"),
    (f"{GENERATION}.watermarking_config", "seeding_scheme"): WordList(
        ("transformers.generation.configuration_utils:WatermarkingConfig.validate",), compared="self.seeding_scheme"
    ),
}


# Where the help of a section's keys stands. A constant is a docstring that several classes share.
_HELP: dict[str, tuple[str, ...]] = {
    **{name: (definition,) for name, (_, definition) in sections.OWNERS.items() if definition},
    "model": (
        "transformers.modeling_utils:PreTrainedModel.from_pretrained",
        "transformers.models.auto.auto_factory:FROM_PRETRAINED_TORCH_DOCSTRING",
    ),
    "tokenizer": (
        "transformers.models.auto.tokenization_auto:AutoTokenizer.from_pretrained",
        "transformers.tokenization_utils_base:INIT_TOKENIZER_DOCSTRING",
        "transformers.tokenization_utils_base:PreTrainedTokenizerBase.from_pretrained",
    ),
    GENERATION: (sections.GENERATION[1],),
    SOURCE: (sections.LOAD_DATASET[1],),
}


def get_help(section: str, name: str) -> str:
    """Return what a key is for, ours or in its owner's words; "" where nobody says."""
    ours = sections.OWN_HELP.get(section, {}).get(name)
    return ours or next(
        (text for owner in _HELP.get(section, ()) if (text := upstream_fields.read_help(owner, name))), ""
    )


@functools.cache
def get_fields(section: str) -> dict[str, Field]:
    """Return all keys of a section, `data.*` or `evaluate.generation` with their types: the owner's, and ours."""
    if section == GENERATION:
        return add_words(section, upstream_fields.read_popped_keywords(sections.GENERATION[1]))
    if section == SOURCE:
        return get_source_fields("")
    definition = sections.OWNERS[section][1]
    theirs = upstream_fields.read_fields(definition) if definition else {}
    if section == "lora":
        theirs = {name: _as_mapping(field, definition) for name, field in theirs.items()}
    ours = sections.KEYWORDS.get(section, {}) | sections.OWN_KEYS[section]
    return add_words(section, theirs | {name: types.make_field(name, written) for name, written in ours.items()})


@functools.cache
def get_source_fields(builder: str) -> dict[str, Field]:
    """Return all keys of one source: ours, those of `datasets.load_dataset` and of its builder."""
    theirs = upstream_fields.read_fields(get_builder_config(builder)) if builder else {}
    call = {n: f for n, f in upstream_fields.read_arguments(sections.LOAD_DATASET[1]).items() if n != "path"}
    return theirs | call | {n: types.make_field(n, written) for n, written in sections.OWN_KEYS[SOURCE].items()}


def get_builder_config(builder: str) -> str:
    """Return the class whose fields are the keywords of a builder of datasets."""
    return f"datasets.packaged_modules.{builder}.{builder}:{builder.capitalize()}Config"


def add_words(section: str, fields: dict[str, Field]) -> dict[str, Field]:
    """Return fields with the words that `WORDS` finds for those of a section."""
    listed = {name: listing for (where, name), listing in WORDS.items() if where == section and name in fields}
    return fields | {name: fields[name]._replace(choices=listing) for name, listing in listed.items()}


def find_dataclasses(field: Field) -> list[str]:
    """Return the dataclasses of a field's type as `module:Class`."""
    names = [types.get_type_name(part) for part in types.split_union(field.type)]
    homes = [f"{upstream_source.find_defining_module(field.module, name)}:{name}" for name in names if name]
    return [home for home in homes if upstream_fields.is_dataclass(home)]


def _as_mapping(field: Field, owner: str) -> Field:
    """Return a field of LoraConfig so that it takes a mapping where peft makes the class of its type from one."""
    found = find_dataclasses(field)
    if not found or field.type is None:
        return field
    module, _, name = owner.partition(":")
    post = upstream_source.find_function(module, f"{name}.__post_init__")
    for item in ast.walk(post) if post else ():
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == f"self.{field.name}":
            made = {ast.unparse(node) for node in ast.walk(item.value) if isinstance(node, ast.Name | ast.Attribute)}
            if {found[0].partition(":")[2], f"self.{field.name}"} <= made:
                return field._replace(type=ast.BinOp(field.type, ast.BitOr(), ast.Name("dict")))
    return field
