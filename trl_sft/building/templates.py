"""The templates that write rows, read from YAML files: which turns a row has, and what the generator is asked for each.

Inputs: files, those of this package and the user's own. Outputs: `RowTemplate`s and `AugmentationTemplate`s; a fault
with its line for everything else. A placeholder is a name in braces, `{topic}`; braces around anything else are text.
Not here: what the placeholders stand for (`generation`, `augmentation`).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_sft.building import spec_keys
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import key_check, yaml_reader
from trl_sft.recipe.upstream import types
from trl_sft.recipe.upstream.nested import NestedFields
from trl_sft.recipe.yaml_reader import Key, Recipe
from trl_sft.suggestions import LOOSE, nearest_name

FOLDER = Path(__file__).with_name("template_files")
_AUGMENTATIONS = "augmentations.yaml"
PLACEHOLDER = re.compile(r"\{(\w+)\}")
NEEDS = ("topic", "seed")
_ROW_NAMES = ("topic", "requirements", "variation", "conversation", "seed_instruction", "language")
_CHILD_NAMES = ("instruction", "answer", "requirements")
_HASH_DIGITS = 12
_FILE_KEYS = {"language": "Literal['en', 'zh']", "templates": "dict[str, dict[str, Any]]"}
_FILE_KEYS["family"] = "Literal['basic', 'multi_turn', 'task', 'chain_of_thought']"
_TEMPLATE_KEYS = {"needs": "Literal['topic', 'seed']", "turns": "list[dict[str, Any]]"}
_TURN_KEYS = {"role": "Literal['user', 'assistant']", "write": "str", "text": "str", "system": "str"}


class TemplateTurn(NamedTuple):
    """One turn of a row, and where it comes from."""

    role: str  # user or assistant
    write: str  # of a user turn: the prompt after which the generator writes it
    text: str  # of a user turn: the turn itself, without a call
    system: str  # of an assistant turn: the system prompt under which the generator answers

    @property
    def is_call(self) -> bool:
        """Tell whether the generator is called for this turn."""
        return self.role == "assistant" or bool(self.write)


class RowTemplate(NamedTuple):
    """How a row is written."""

    name: str
    family: str
    language: str
    needs: str  # topic or seed
    turns: tuple[TemplateTurn, ...]
    digest: str  # of the whole template

    @property
    def calls(self) -> int:
        """How often the generator is called for one row."""
        return sum(turn.is_call for turn in self.turns)


class AugmentationTemplate(NamedTuple):
    """How a row becomes another one."""

    name: str
    write: str  # the prompt for the new instruction; "" = the old one with a text of `append`
    append: tuple[str, ...]
    answer: str  # parent (the old answer), new, or rewrite
    system: str  # under which a new answer is written
    rewrite: str  # the prompt for the old answer in another form
    keeps_facts: bool  # numbers, names and quoted texts must stay
    digest: str

    @property
    def calls(self) -> int:
        """How often the generator is called for one row."""
        return bool(self.write) + (self.answer != "parent")


class LanguageTexts(NamedTuple):
    """What the prompts of one language say of the axes."""

    labels: Mapping[str, str]  # axis -> its name in the language
    line: str  # "- {name}: {value}"
    described: str  # "{value} ({description})"

    def format_requirements(self, cell: Mapping[str, str], descriptions: Mapping[tuple[str, str], str]) -> str:
        """Return a line for each axis of a cell; the family of the template is no requirement."""
        lines = []
        for axis, value in cell.items():
            if axis == spec_keys.FAMILY:
                continue
            description = descriptions.get((axis, value))
            shown = fill(self.described, {"value": value, "description": description}) if description else value
            lines.append(fill(self.line, {"name": self.labels.get(axis, axis), "value": shown}))
        return "\n".join(lines)


NO_TEXTS = LanguageTexts({}, "", "")  # of a turn that needs no requirements


def fill(text: str, values: Mapping[str, object]) -> str:
    """Return a text with its placeholders replaced; a name that has no value stays as it is."""
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]) if match[1] in values else match[0], text)


def read_templates(
    language: str, own_files: Sequence[Path], *, axes: Collection[str], faults: list[Fault]
) -> list[RowTemplate]:
    """Return the templates of a language: those of this package, and of families with own files those alone.

    Args:
        language: en or zh.
        own_files: of the user.
        axes: names that a placeholder may have too.
        faults: Collects what is wrong.

    """
    templates: list[RowTemplate] = []
    for path in own_files:
        templates += _read_file(path, language, axes=axes, faults=faults)
    replaced = {template.family for template in templates}
    for family in spec_keys.FAMILIES:
        if family not in replaced:
            templates += _read_file(FOLDER / language / f"{family}.yaml", language, axes=axes, faults=faults)
    return templates


def read_augmentations(language: str) -> tuple[dict[str, AugmentationTemplate], LanguageTexts]:
    """Return the augmentations of a language by their names, and its words for axes."""
    values = yaml.safe_load((FOLDER / language / _AUGMENTATIONS).read_text(encoding="utf-8"))
    labels = dict(values["labels"])
    texts = LanguageTexts(labels, labels.pop("line"), labels.pop("described"))
    augmentations = {}
    for name, value in values["augmentations"].items():
        fields = {"write": "", "append": (), "system": "", "rewrite": "", "keeps_facts": False} | value
        fields["append"] = tuple(fields["append"])
        augmentations[name] = AugmentationTemplate(name=name, digest=_hash(value), **fields)
    return augmentations, texts


def _read_file(path: Path, language: str, *, axes: Collection[str], faults: list[Fault]) -> list[RowTemplate]:
    """Return the templates of one file."""
    try:
        recipe, file_faults = yaml_reader.collect_faults(path)
    except RecipeError as error:
        faults += error.faults
        return []
    faults += file_faults
    values = key_check.check_mapping(
        recipe, (), recipe.values, owner=_declare("a file of templates", _FILE_KEYS), faults=faults
    )
    missing = [name for name in _FILE_KEYS if name not in recipe.values]
    if missing:
        fix = f"Write `{missing[0]}:` at the top of the file."
        faults.append(recipe.fault((), f"the file has no `{missing[0]}`", fix, code="recipe.needs_key"))
    if len(values) < len(_FILE_KEYS):
        return []
    if values["language"] != language:
        problem = f"the templates are in {values['language']}, and the spec has language {language}"
        fix = f"Name a file with `language: {language}`, or set `plan.language`."
        faults.append(recipe.fault(("language",), problem, fix, code="recipe.contradiction"))
    names = {*_ROW_NAMES, *axes}
    return [
        template
        for name, value in values["templates"].items()
        if (template := _read_template(recipe, str(name), value, names=names, faults=faults))
    ]


def _read_template(
    recipe: Recipe, name: str, value: Mapping[str, Any], *, names: Collection[str], faults: list[Fault]
) -> RowTemplate | None:
    """Return one template; None if it has faults."""
    key: Key = ("templates", name)
    before = len(faults)
    fields = key_check.check_mapping(recipe, key, value, owner=_declare("a template", _TEMPLATE_KEYS), faults=faults)
    turns = []
    for number, turn in enumerate(fields.get("turns", [])):
        here = (*key, "turns", number)
        declared = _declare("a turn", _TURN_KEYS)
        checked = {"role": "", "write": "", "text": "", "system": ""}
        checked |= key_check.check_mapping(recipe, here, turn, owner=declared, faults=faults)
        turns.append(TemplateTurn(**checked))
        faults += _check_turn(recipe, here, turns[-1], names=names)
    roles = [turn.role for turn in turns]
    if len(faults) == before and (not roles or roles != ["user", "assistant"] * (len(roles) // 2)):
        problem = f"the turns are {', '.join(roles) or 'none'}"
        fix = "Write user and assistant in turn, and end with an assistant turn."
        faults.append(recipe.fault((*key, "turns"), problem, fix, code="build.template_turns"))
    if len(faults) > before:
        return None
    return RowTemplate(
        name=name,
        family=recipe.values["family"],
        language=recipe.values["language"],
        needs=fields.get("needs", "topic"),
        turns=tuple(turns),
        digest=_hash(value),
    )


def _check_turn(recipe: Recipe, key: Key, turn: TemplateTurn, *, names: Collection[str]) -> list[Fault]:
    """Return the faults of a turn: its text, and its placeholders."""
    faults = []
    if turn.role == "user" and bool(turn.write) == bool(turn.text):
        fix = "Write `write:` (the prompt after which the generator writes the turn) or `text:` (the turn itself)."
        problem = "a user turn has both `write` and `text`" if turn.write else "the user turn has no text"
        faults.append(recipe.fault(key, problem, fix, code="build.template_turns"))
    if turn.role == "assistant" and (turn.write or turn.text):
        fix = "Write `system:`, under which the generator answers, or nothing but the role."
        faults.append(
            recipe.fault(key, "an assistant turn is always written by the generator", fix, code="build.template_turns")
        )
    for part in ("write", "text", "system"):
        for match in PLACEHOLDER.finditer(getattr(turn, part)):
            if match[1] in names:
                continue
            similar = nearest_name(match[1], names, cutoff=LOOSE)
            fix = f"Did you mean `{{{similar}}}`?" if similar else f"Use one of {', '.join(sorted(names))}."
            faults.append(
                recipe.fault((*key, part), f"there is no placeholder {match[0]}", fix, code="build.unknown_placeholder")
            )
    return faults


def _declare(owner: str, keys: Mapping[str, str]) -> NestedFields:
    """Return the keys of a mapping of a file of templates."""
    return NestedFields(owner, {name: types.make_field(name, annotation) for name, annotation in keys.items()})


def _hash(value: Mapping[str, Any]) -> str:
    """Return the digest of a template, by which rows name it."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:_HASH_DIGITS]
