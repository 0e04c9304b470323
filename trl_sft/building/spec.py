"""A spec becomes a checked `Spec`: every key known, typed and in range, every file there; all faults together.

Inputs: a YAML file, read as strictly as a recipe, and overrides. Outputs: a `Spec`; or a RecipeError with every fault.
Nothing is called or loaded. Not here: the keys themselves (`spec_keys`), and templates (`templates`).
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import user_paths
from trl_sft.building import seeds, spec_keys, templates
from trl_sft.building.seeds import SeedRow
from trl_sft.building.templates import RowTemplate
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import key_check, paths, yaml_reader
from trl_sft.recipe.upstream import types
from trl_sft.recipe.upstream.nested import NestedFields
from trl_sft.recipe.yaml_reader import Key, Recipe, describe_value
from trl_sft.suggestions import LOOSE, nearest_name

_OWNER = "a spec"
_MOST_ROWS = 1_000_000
_MOST_CELLS = 20_000
_AXIS_NAME = re.compile(r"[^\W\d]\w*")
_ADDRESS = re.compile(r"https?://[^/\s]+")
_DEFAULT_AXES = ("task", "domain", "difficulty")  # of the balance
RESERVED_AXES = {spec_keys.FAMILY, spec_keys.TOPIC, "requirements", "variation", "conversation", "seed_instruction"}
RESERVED_AXES |= {"instruction", "answer", "language"}


class AxisValue(NamedTuple):
    """One value of an axis."""

    name: str
    share: float  # of the rows, relative to the other values
    description: str  # "" = none


@dataclass(frozen=True)
class Spec:
    """A checked spec.

    Attributes:
        recipe: The file as written.
        sections: Section -> its keys, with defaults. `judge` and `augmentation` are there only if the spec has them.
        axes: Axis -> its values; the family of the template is the first axis.
        topics: (topic, value of the axis `domain`; "" = any).
        seed_rows: Examples, and problems with a known answer.
        evaluation_prompts: Of the files of `gates.evaluation`.
        templates: Those of the language whose needs the seeds meet.
        folder: The folder of the set, absolute.

    """

    recipe: Recipe
    sections: Mapping[str, Mapping[str, Any]]
    axes: Mapping[str, tuple[AxisValue, ...]]
    topics: tuple[tuple[str, str], ...]
    seed_rows: tuple[SeedRow, ...]
    evaluation_prompts: tuple[str, ...]
    templates: tuple[RowTemplate, ...]
    folder: Path

    @property
    def language(self) -> str:
        """The language of templates and rows."""
        return str(self.sections[spec_keys.PLAN]["language"])

    @property
    def seed(self) -> int:
        """The seed of the plan."""
        return int(self.sections[spec_keys.PLAN]["seed"])

    @property
    def descriptions(self) -> dict[tuple[str, str], str]:
        """What values of axes mean: (axis, value) -> description."""
        return {(axis, value.name): value.description for axis, values in self.axes.items() for value in values}

    def get(self, section: str, name: str) -> Any:
        """Return the value of a key, or its default."""
        return self.sections[section][name]


def load_spec(path: str | Path, overrides: Sequence[str] = ()) -> Spec:
    """Read and check a spec.

    Args:
        path: The YAML file.
        overrides: Texts of the form `section.key=value`.

    Raises:
        RecipeError: With every fault, in the order of the lines.

    """
    try:
        recipe, faults = yaml_reader.collect_faults(path, overrides)
    except RecipeError as error:
        raise RecipeError([_word_for_spec(fault) for fault in error.faults]) from None
    faults = [_word_for_spec(fault) for fault in faults]
    sections = _check_sections(recipe, faults)
    axes = _read_axes(recipe, sections, faults)
    topics = _read_topics(recipe, sections[spec_keys.SEEDS].get("topics"), axes, faults=faults)
    seed_rows = _read_seed_rows(recipe, sections[spec_keys.SEEDS].get("rows"), faults)
    prompts = _read_evaluation_prompts(recipe, sections[spec_keys.GATES]["evaluation"], faults)
    row_templates = _read_templates(
        recipe, sections, axes, faults=faults, has_topics=bool(topics), has_seeds=bool(seed_rows)
    )
    faults += _check_together(recipe, sections, axes)
    folder = _find_folder(recipe, sections[spec_keys.OUTPUT].get("folder"), faults)
    if faults:
        different = {(fault.where, fault.problem): fault for fault in faults}
        raise RecipeError(sorted(different.values(), key=_find_line))
    return Spec(
        recipe=recipe,
        sections=sections,
        axes=axes,
        topics=topics,
        seed_rows=seed_rows,
        evaluation_prompts=prompts,
        templates=tuple(row_templates),
        folder=folder,
    )


def declare_section(section: str) -> NestedFields:
    """Return the keys of a section as fields, by which values are checked and the schema is made."""
    keys = spec_keys.SECTIONS[section]
    return NestedFields(_OWNER, {name: types.make_field(name, key.type) for name, key in keys.items()})


def _word_for_spec(fault: Fault) -> Fault:
    """Return a fault of the reader of recipes in words for a spec."""
    problem = (
        fault.problem.replace("a recipe", _OWNER).replace("the recipe", "the spec").replace("not a spec", "no spec")
    )
    fix = fault.fix
    if fault.code in ("recipe.empty", "recipe.not_a_mapping"):
        fix = "Start with a ready spec: `python -m trl_sft build --example en -o SPEC.yaml`."
    elif fault.code in ("recipe.other_file", "recipe.not_found"):
        fix = "Write the path of a spec. `python -m trl_sft build --example en -o SPEC.yaml` writes one."
    return fault._replace(problem=problem, fix=fix.replace("a recipe", _OWNER))


def _find_line(fault: Fault) -> int:
    """Return the line of a fault; overrides and other files come last."""
    line = getattr(fault.where, "line", None)
    return line if isinstance(line, int) else sys.maxsize


def _check_sections(recipe: Recipe, faults: list[Fault]) -> dict[str, dict[str, Any]]:
    """Return the sections with their defaults; append a fault for each key that is unknown or wrong."""
    for name in recipe.values:
        if name not in spec_keys.SECTIONS:
            similar = nearest_name(str(name), spec_keys.SECTIONS, cutoff=LOOSE)
            fix = f"Did you mean `{similar}`?" if similar else f"Use one of {', '.join(spec_keys.SECTIONS)}."
            faults.append(recipe.fault((name,), f"a spec has no section `{name}:`", fix, code="recipe.unknown_section"))
    sections: dict[str, dict[str, Any]] = {}
    for name, keys in spec_keys.SECTIONS.items():
        value = recipe.values.get(name)
        if value is not None and not isinstance(value, dict):
            fix = f"Write the keys of `{name}:` below it, indented."
            problem = f"the section is {describe_value(value)}, not a mapping"
            faults.append(recipe.fault((name,), problem, fix, code="recipe.not_a_mapping"))
            value = None
        if value is None and name in (spec_keys.JUDGE, spec_keys.AUGMENTATION):
            continue
        if name == spec_keys.AXES:
            sections[name] = dict(value or {})
            continue
        checked = key_check.check_mapping(recipe, (name,), value or {}, owner=declare_section(name), faults=faults)
        faults += _check_ranges(recipe, name, checked)
        if value is not None or name in spec_keys.REQUIRED:
            faults += _find_missing(recipe, name, value or {})
        defaults = {key: spec_keys.get_default(name, key) for key in keys}
        sections[name] = defaults | {key: item for key, item in checked.items() if item is not None}
    return sections


def _find_missing(recipe: Recipe, section: str, values: Mapping[str, Any]) -> list[Fault]:
    """Return a fault for each required key that a section lacks."""
    missing = [
        name for name, key in spec_keys.SECTIONS[section].items() if key.is_required and values.get(name) is None
    ]
    return [
        recipe.fault(
            (section, name),
            f"`{section}.{name}` is missing",
            f"Write `{name}:` below `{section}:`.",
            code="recipe.needs_key",
        )
        for name in missing
    ]


def _check_ranges(recipe: Recipe, section: str, values: Mapping[str, Any]) -> list[Fault]:
    """Return a fault for each number that is out of range."""
    faults = []
    for name, value in values.items():
        key = spec_keys.SECTIONS[section][name]
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        is_low = key.least is not None and (value < key.least or (key.is_above and value == key.least))
        is_high = key.most is not None and value > key.most
        if math.isfinite(value) and not is_low and not is_high:
            continue
        expected = f"a number{key.describe_range().replace(',', '')}"
        faults.append(_out_of_range(recipe, (section, name), value, expected=expected))
    return faults


def _out_of_range(recipe: Recipe, key: Key, value: object, *, expected: str) -> Fault:
    """Return the fault of a number that is out of range."""
    return recipe.fault(key, f"the value is {describe_value(value)}", f"Write {expected}.", code="recipe.out_of_range")


def _read_axes(
    recipe: Recipe, sections: Mapping[str, Mapping[str, Any]], faults: list[Fault]
) -> dict[str, tuple[AxisValue, ...]]:
    """Return the axes, the family of the template first."""
    key: Key = (spec_keys.TEMPLATES, "families")
    axes = {spec_keys.FAMILY: _read_axis(recipe, key, sections[spec_keys.TEMPLATES]["families"], faults=faults)}
    for value in axes[spec_keys.FAMILY]:
        if value.name not in spec_keys.FAMILIES:
            similar = nearest_name(value.name, spec_keys.FAMILIES, cutoff=LOOSE)
            fix = f"Did you mean `{similar}`?" if similar else f"Use {', '.join(spec_keys.FAMILIES)}."
            faults.append(recipe.fault(key, f"there is no family `{value.name}`", fix, code="build.unknown_family"))
    for name, value in sections[spec_keys.AXES].items():
        here: Key = (spec_keys.AXES, name)
        if not isinstance(name, str) or not _AXIS_NAME.fullmatch(name) or name in RESERVED_AXES:
            fix = "Name the axis with letters and _, and not with a word that templates use otherwise."
            faults.append(recipe.fault(here, f"no axis can have the name `{name}`", fix, code="build.bad_axis"))
            continue
        axes[name] = _read_axis(recipe, here, value, faults=faults)
    cells = math.prod(max(len(values), 1) for values in axes.values())
    if cells > _MOST_CELLS:
        fix = "Leave out an axis, or name fewer values."
        problem = f"the axes have {cells:,} cells, and a spec has at most {_MOST_CELLS:,}"
        faults.append(recipe.fault((spec_keys.AXES,), problem, fix, code="build.bad_axis"))
    return axes


def _read_axis(recipe: Recipe, key: Key, value: Any, *, faults: list[Fault]) -> tuple[AxisValue, ...]:
    """Return the values of one axis; () if it has faults."""
    items = dict.fromkeys(map(str, value), 1.0) if isinstance(value, list) else value
    if not isinstance(items, dict) or not items or (isinstance(value, list) and len(items) < len(value)):
        problem = (
            "a value stands twice" if isinstance(items, dict) and items else f"the axis is {describe_value(value)}"
        )
        fix = "Write a list of values, or a mapping from each value to its share."
        faults.append(recipe.fault(key, problem, fix, code="build.bad_axis"))
        return ()
    values = []
    for name, entry in items.items():
        here = (*key, name)
        item = entry if isinstance(entry, dict) else {"share": entry}
        fields = {part: types.make_field(part, declared.type) for part, declared in spec_keys.AXIS_VALUE.items()}
        checked = key_check.check_mapping(
            recipe, here, item, owner=NestedFields("a value of an axis", fields), faults=faults
        )
        share = checked.get("share", 1.0)
        if not (math.isfinite(share) and share >= 0):
            faults.append(_out_of_range(recipe, here, share, expected="a number from 0"))
            share = 1.0
        values.append(AxisValue(str(name), float(share), checked.get("description", "")))
    if not sum(value.share for value in values):
        faults.append(recipe.fault(key, "every share is 0", "Write a share above 0.", code="recipe.out_of_range"))
        return ()
    return tuple(value for value in values if value.share)


def _read_topics(
    recipe: Recipe, value: Any, axes: Mapping[str, tuple[AxisValue, ...]], *, faults: list[Fault]
) -> tuple[tuple[str, str], ...]:
    """Return the topics, each with the domain that it belongs to."""
    key: Key = (spec_keys.SEEDS, "topics")
    if value is None:
        return ()
    if isinstance(value, str):
        path = paths.make_absolute(value, recipe.folder(key))
        lines = seeds.read_topics(recipe, key, path, faults=faults)
        return tuple((line, "") for line in lines)
    groups = value if isinstance(value, dict) else {"": value}
    domains = [item.name for item in axes.get("domain", ())]
    for name in groups:
        if name and name not in domains:
            similar = nearest_name(str(name), domains, cutoff=LOOSE)
            fix = f"Did you mean `{similar}`?" if similar else "Use the values of `axes.domain`, or write one list."
            faults.append(
                recipe.fault((*key, name), f"`axes.domain` has no value `{name}`", fix, code="build.unknown_domain")
            )
    topics = [(topic.strip(), str(name)) for name, items in groups.items() for topic in items]
    missing = [name for name in domains if isinstance(value, dict) and name not in groups]
    if missing:
        fix = f"Write topics for `{missing[0]}`, or write one list for all domains."
        faults.append(recipe.fault(key, f"the domain `{missing[0]}` has no topics", fix, code="build.unknown_domain"))
    if not topics or not all(topic for topic, _ in topics):
        faults.append(
            recipe.fault(
                key, "a topic is empty, or there is none", "Write each topic as a text.", code="data.empty_value"
            )
        )
    return tuple(topics)


def _read_seed_rows(recipe: Recipe, value: Any, faults: list[Fault]) -> tuple[SeedRow, ...]:
    """Return the seed rows of a file."""
    if value is None:
        return ()
    key: Key = (spec_keys.SEEDS, "rows")
    return tuple(seeds.read_rows(recipe, key, paths.make_absolute(value, recipe.folder(key)), faults=faults))


def _read_evaluation_prompts(recipe: Recipe, files: Sequence[str], faults: list[Fault]) -> tuple[str, ...]:
    """Return the prompts of evaluation sets."""
    prompts: list[str] = []
    for number, value in enumerate(files):
        key: Key = (spec_keys.GATES, "evaluation", number)
        path = paths.make_absolute(value, recipe.folder(key))
        prompts += [row.instruction for row in seeds.read_rows(recipe, key, path, faults=faults)]
    return tuple(prompts)


def _read_templates(
    recipe: Recipe,
    sections: Mapping[str, Mapping[str, Any]],
    axes: Mapping[str, tuple[AxisValue, ...]],
    *,
    faults: list[Fault],
    has_topics: bool,
    has_seeds: bool,
) -> list[RowTemplate]:
    """Return the templates of the chosen families whose needs the seeds meet."""
    files = []
    for number, value in enumerate(sections[spec_keys.TEMPLATES]["files"]):
        key: Key = (spec_keys.TEMPLATES, "files", number)
        path = paths.make_absolute(value, recipe.folder(key))
        if path.is_file():
            files.append(path)
        else:
            fix = "Correct the path; it is relative to the spec."
            faults.append(recipe.fault(key, f"{value}: there is no such file", fix, code="recipe.missing_file"))
    available = {"topic": has_topics, "seed": has_seeds}
    if not any(available.values()):
        if not any(fault.where.key[:1] == (spec_keys.SEEDS,) for fault in faults if hasattr(fault.where, "key")):
            fix = "Write `topics:` (a list), `rows:` (a JSONL file), or both below `seeds:`."
            faults.append(recipe.fault((spec_keys.SEEDS,), "the spec has no seeds", fix, code="build.no_seeds"))
        return []
    language = sections[spec_keys.PLAN]["language"]
    found = templates.read_templates(language, files, axes=axes, faults=faults)
    usable = [template for template in found if available[template.needs]]
    for value in axes[spec_keys.FAMILY]:
        if (
            value.name in spec_keys.FAMILIES
            and not any(template.family == value.name for template in usable)
            and not faults
        ):
            missing = "seeds.topics" if has_seeds else "seeds.rows"
            problem = f"no template of the family `{value.name}` can be used without `{missing}`"
            fix = f"Write `{missing}`, or leave the family out of `templates.families`."
            faults.append(recipe.fault((spec_keys.TEMPLATES, "families"), problem, fix, code="build.no_template"))
    chosen = {value.name for value in axes[spec_keys.FAMILY]}
    return [template for template in usable if template.family in chosen]


def _check_together(
    recipe: Recipe, sections: Mapping[str, Mapping[str, Any]], axes: Mapping[str, tuple[AxisValue, ...]]
) -> list[Fault]:
    """Return the faults of keys that depend on each other."""
    faults = []
    plan = sections[spec_keys.PLAN]
    if plan["rows"] is not None and plan["rows"] * plan["surplus"] > _MOST_ROWS:
        faults.append(
            _out_of_range(
                recipe,
                (spec_keys.PLAN, "rows"),
                plan["rows"],
                expected=f"at most {_MOST_ROWS:,} rows, the surplus counted",
            )
        )
    for section in (spec_keys.GENERATOR, spec_keys.JUDGE):
        model = sections.get(section, {})
        if model.get("endpoint") is not None and not _ADDRESS.match(model["endpoint"]):
            problem = f"{model['endpoint']} is no address of a server"
            fix = "Write it with http:// or https://, and up to /v1: http://127.0.0.1:8000/v1."
            faults.append(recipe.fault((section, "endpoint"), problem, fix, code="recipe.wrong_type"))
        reserved = {"model", "messages", "stream", "n"} & {*model.get("options", {})}
        if reserved:
            name = min(reserved)
            faults.append(
                recipe.fault(
                    (section, "options", name), f"`{name}` is set by the build", "Remove it.", code="recipe.refused_key"
                )
            )
        prices = [model.get("input_price"), model.get("output_price")]
        if model.get("endpoint") and sections[spec_keys.BUDGET]["money"] is not None and None in prices:
            fix = f"Write `{section}.input_price` and `{section}.output_price`."
            problem = f"`budget.money` needs the prices of the model of `{section}:`"
            faults.append(recipe.fault((spec_keys.BUDGET, "money"), problem, fix, code="recipe.needs_key"))
    generator, judge = sections[spec_keys.GENERATOR], sections.get(spec_keys.JUDGE)
    if judge and judge["model"] and (judge["endpoint"], judge["model"]) == (generator["endpoint"], generator["model"]):
        problem = "the judge is the model that writes the rows: it prefers its own text"
        fix = "Name another model, best of another family."
        faults.append(recipe.fault((spec_keys.JUDGE, "model"), problem, fix, code="build.judge_is_generator"))
    if judge and judge["model"] and judge["endpoint"] is None:
        fix = "Write `judge.endpoint`: a judge is a model behind a server."
        faults.append(
            recipe.fault((spec_keys.JUDGE, "endpoint"), "`judge.endpoint` is missing", fix, code="recipe.needs_key")
        )
    known = [*axes, spec_keys.TOPIC]
    for number, name in enumerate(sections[spec_keys.BALANCE]["by"] or []):
        if name not in known:
            similar = nearest_name(name, known, cutoff=LOOSE)
            fix = f"Did you mean `{similar}`?" if similar else f"Use {', '.join(known)}."
            faults.append(
                recipe.fault(
                    (spec_keys.BALANCE, "by", number), f"there is no axis `{name}`", fix, code="build.bad_axis"
                )
            )
    if sections[spec_keys.BALANCE]["min_score"] is not None and judge is None:
        fix = "Write the section `judge:`, or remove `balance.min_score`."
        faults.append(
            recipe.fault((spec_keys.BALANCE, "min_score"), "no judge scores the rows", fix, code="recipe.needs_key")
        )
    return faults


def choose_balance_axes(spec: Spec) -> tuple[str, ...]:
    """Return the axes whose cells are balanced and counted."""
    chosen = spec.get(spec_keys.BALANCE, "by")
    names = chosen or [name for name in _DEFAULT_AXES if name in spec.axes] or [spec_keys.FAMILY]
    return tuple(names)


def _find_folder(recipe: Recipe, value: Any, faults: list[Fault]) -> Path:
    """Return the folder of the set."""
    key: Key = (spec_keys.OUTPUT, "folder")
    # relative to the current folder, as `train.output_dir` of a recipe is
    folder = paths.make_absolute(value, Path.cwd()) if value else Path.cwd() / "data" / recipe.path.stem
    if problem := user_paths.find_problem(folder, user_paths.FOLDER, is_output=True):
        faults.append(
            recipe.fault(key, f"{user_paths.shorten(str(folder))}: {problem.problem}", problem.fix, code=problem.code)
        )
    return folder
