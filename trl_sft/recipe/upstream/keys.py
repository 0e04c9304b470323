"""All keys of a section of a recipe and of one data source, with the types that their owners declare.

Inputs: a section. Outputs: fields. The tables here say only where upstream keeps the words and the help that a type
does not show; the words themselves are read there. Not here: mappings under a key (`nested`), old names
(`renamed_keys`).
"""

from __future__ import annotations

import ast
import functools

from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields as upstream_fields
from trl_sft.recipe.upstream import packages, types
from trl_sft.recipe.upstream import source as upstream_source
from trl_sft.recipe.upstream.fields import Field, WordList

GENERATION = "evaluate.generation"
SOURCE = "data.*"
PARALLELISM = "parallelism_config"
_QUANTIZATION = sections.OWNERS["quantization"][1]
_GENERATION_CHECK = sections.GENERATION[1].replace("__init__", "validate")

# (section, key) -> where upstream lists the words that the key takes, if the key's type does not list them.
WORDS: dict[tuple[str, str], WordList] = {
    ("model", "attn_implementation"): WordList(
        ("transformers.modeling_utils:AttentionInterface._global_mapping",),
        extra_words=("eager",),
        pattern=r"[^/:]+/[^/:]+(@[^/:]+)?(:[^/:]+)?",  # transformers.integrations.hub_kernels.is_kernel
        pattern_description="OWNER/KERNEL of the hub",
    ),
    # The check of TRL, which loads the model; its own default is float32.
    ("model", "dtype"): WordList(
        ("trl.trainer.utils:create_model_from_path",), compared_variable="dtype", extra_words=("auto",)
    ),
    ("model", "experts_implementation"): WordList(
        (
            "transformers.integrations.moe:ExpertsInterface._global_mapping",
            "transformers.integrations.finegrained_fp8:FP8ExpertsInterface._global_mapping",
        ),
        extra_words=("eager",),
    ),
    ("quantization", "bnb_4bit_compute_dtype"): WordList(("torch._C:dtype",), is_stub_type=True),
    ("quantization", "bnb_4bit_quant_storage"): WordList((_QUANTIZATION,), compared_variable="bnb_4bit_quant_storage"),
    ("train", "debug"): WordList(("transformers.debug_utils:DebugOption",), accepts_several=True),
    ("train", "include_num_input_tokens_seen"): WordList(
        ("transformers.training_args:TrainingArguments",), documented_key="include_num_input_tokens_seen"
    ),
    ("train", "report_to"): WordList(
        ("transformers.integrations.integration_utils:INTEGRATION_TO_CALLBACK",), extra_words=("all", "none")
    ),
    ("train", "torch_compile_backend"): WordList(("accelerate.utils.dataclasses:DynamoBackend",), ignores_case=True),
    ("train", "torch_compile_mode"): WordList(("torch._inductor:list_mode_options",)),
    (GENERATION, "cache_implementation"): WordList((_GENERATION_CHECK,), compared_variable="self.cache_implementation"),
    (GENERATION, "early_stopping"): WordList((_GENERATION_CHECK,), compared_variable="self.early_stopping"),
    (f"{GENERATION}.watermarking_config", "seeding_scheme"): WordList(
        ("transformers.generation.configuration_utils:WatermarkingConfig.validate",),
        compared_variable="self.seeding_scheme",
    ),
}


def get_builder_config(builder: str) -> str:
    """Return the class whose fields are the keywords of a builder of datasets, as `module:Class`."""
    return f"datasets.packaged_modules.{builder}.{builder}:{builder.capitalize()}Config"


# section -> the owners whose help describes its keys, the first that has a key first.
# A constant is a docstring that several classes share.
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
    SOURCE: (
        sections.LOAD_DATASET[1],
        *(get_builder_config(builder) for builder in dict.fromkeys(sections.BUILDERS.values())),
    ),
}


def get_help(section: str, name: str) -> str:
    """Return what a key is for, in our words or in its owner's; "" if neither says."""
    if own_help := sections.OWN_HELP.get(section, {}).get(name):
        return own_help
    for owner in _HELP.get(section, ()):
        if text := upstream_fields.read_help(owner, name):
            return text
    return ""


@functools.cache
def get_fields(section: str) -> dict[str, Field]:
    """Return all keys of a section with their types, those of the owner and our own.

    Args:
        section: a section of a recipe, `data.*` (one source, whatever its files) or `evaluate.generation`.

    Raises:
        UpstreamChanged: the owner is not where this version of trl_sft reads it.
        MissingPackage: the owner's package is not installed.

    """
    if section == SOURCE:
        return get_source_fields("")
    if section == GENERATION:
        owner = sections.GENERATION[1]
        declared = upstream_fields.read_popped_keywords(owner)
    else:
        owner = sections.OWNERS[section][1]
        declared = upstream_fields.read_fields(owner) if owner else {}
    if owner and not declared:
        module, _, path = owner.partition(":")
        raise packages.changed_source(module, f"`{path}` no longer declares any key")
    if section == "lora":
        declared = {name: _accept_mapping(field, owner) for name, field in declared.items()}
    if section == "train" and PARALLELISM in declared:  # `model.parallelism` makes the class from a mapping
        declared |= {PARALLELISM: types.make_field(PARALLELISM, "dict[str, Any] | None")._replace(default="None")}
    own_types = sections.KEYWORDS.get(section, {}) | sections.OWN_KEYS.get(section, {})
    own_fields = {name: types.make_field(name, annotation) for name, annotation in own_types.items()}
    return add_words(section, declared | own_fields)


@functools.cache
def get_source_fields(builder: str) -> dict[str, Field]:
    """Return all keys of one source: our own, those of `datasets.load_dataset`, and those of its builder.

    Args:
        builder: the builder of datasets that reads the files (`json`, `csv`); "" if it is not known.

    """
    of_builder = upstream_fields.read_fields(get_builder_config(builder)) if builder else {}
    of_loader = upstream_fields.read_arguments(sections.LOAD_DATASET[1])
    own_types = sections.OWN_KEYS[SOURCE]
    own_fields = {name: types.make_field(name, annotation) for name, annotation in own_types.items()}
    return of_builder | {name: field for name, field in of_loader.items() if name != "path"} | own_fields


def add_words(section: str, fields: dict[str, Field]) -> dict[str, Field]:
    """Return the fields of a section with the word lists of `WORDS`."""
    word_lists = {name: word_list for (place, name), word_list in WORDS.items() if place == section and name in fields}
    return fields | {name: fields[name]._replace(choices=word_list) for name, word_list in word_lists.items()}


def find_dataclasses(field: Field) -> list[str]:
    """Return the dataclasses in a field's type, each as `module:Class`."""
    names = [types.get_type_name(member) for member in types.split_union(field.type)]
    classes = [":".join(upstream_source.resolve(field.module, name)) for name in names if name]
    return [name for name in classes if upstream_fields.is_dataclass(name)]


def _accept_mapping(field: Field, owner: str) -> Field:
    """Return a field that also takes a mapping, where the owner's `__post_init__` makes the field's class from one.

    peft writes `self.eva_config = EvaConfig(**self.eva_config)`.
    """
    classes = find_dataclasses(field)
    if not classes or field.type is None:
        return field
    attribute, class_name = f"self.{field.name}", classes[0].partition(":")[2]
    module, _, name = owner.partition(":")
    method = upstream_source.find_function(module, f"{name}.__post_init__")
    for item in ast.walk(method) if method else ():
        if isinstance(item, ast.Assign) and ast.unparse(item.targets[0]) == attribute:
            names = {ast.unparse(node) for node in ast.walk(item.value) if isinstance(node, ast.Name | ast.Attribute)}
            if {class_name, attribute} <= names:
                return field._replace(type=ast.BinOp(field.type, ast.BitOr(), ast.Name("dict")))
    return field
