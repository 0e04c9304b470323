"""The tables of the importers: well-formed, and every entry used."""

import ast
import datetime
import re
from pathlib import Path

import pytest
import yaml
from importer_outcomes import find_place

from trl_sft.errors import RecipeError
from trl_sft.importers import tables, writer
from trl_sft.importers.settings import AFFECTS, OmittedSetting, RecipeLine, Settings
from trl_sft.recipe import renamed_keys, sections, yaml_reader
from trl_sft.recipe.upstream import keys

ROOT = Path(__file__).parents[2]
TABLES = ("axolotl", "llamafactory", "openrlhf", "trl")


def words_of(name):
    """Every string in the code of a tool's modules: `axolotl`, `axolotl_rows`, ..."""
    folder = tables.get_path(name).parent
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in folder.glob(f"{name}*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    return {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}


def test_every_table_has_a_module_and_an_importer():
    files = {path.stem for path in Path(tables.__file__).parent.glob("*.yaml")}
    assert files == set(TABLES) == {importer.table for importer in writer.TOOLS.values()}


@pytest.mark.parametrize("name", TABLES)
def test_file_reads_the_same_as_strict_yaml_1_2(name):
    """No key stands twice in a mapping, and no value means something else to YAML 1.1, as which tables are read."""
    strict = yaml_reader.read_recipe(tables.get_path(name)).values
    strict["read_on"] = datetime.date.fromisoformat(strict["read_on"])
    assert yaml.load(tables.get_path(name).read_text(encoding="utf-8"), Loader=tables._Loader) == strict


@pytest.mark.parametrize("name", TABLES)
def test_head_names_releases_and_day(name):
    table = tables.load_table(name)
    assert isinstance(table.read_on, datetime.date)
    assert all(isinstance(text, str) and text for text in (table.tool, table.releases, table.sources))
    pages = (ROOT / "README.md", ROOT / "docs" / "tutorials" / "from-another-trainer.md")
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for release in re.findall(r"\d+(?:\.\d+)+", table.releases):
            assert release in text, (page.name, release)


@pytest.mark.parametrize("name", TABLES)
def test_fields_of_every_entry_are_well_formed(name):
    table = tables.load_table(name)
    nested = [row for entries in table.nested.values() for row in entries.items()]
    for setting, entry in [*table.entries.items(), *nested]:
        assert not (entry.key and entry.reason), setting
        assert entry.reason or not (entry.affects or entry.refused), setting
        assert entry.affects in ("", *AFFECTS), setting
        assert entry.key or not (entry.group or entry.note), setting
        for text in (entry.note, entry.reason):
            assert not text or (text.endswith(".") and not text.startswith(" ")), setting
        if entry.key:
            section, _, key = entry.key.partition(".")
            old_names = renamed_keys.RENAMED_KEYS.get(section, {})
            known = {*keys.get_fields(section), *sections.OWN_KEYS[section], *old_names}
            assert key in known, (setting, entry.key)
        if name == "openrlhf":
            assert entry.type in ("", "str", "int", "float", "switch"), setting
        else:
            assert (entry.flag, entry.nargs) == ("", None), setting
            assert any(entry.has_type(value) for value in ("", [], 0, True, {})), setting


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_without_key_and_reason_is_read_by_the_module(name):
    words = words_of(name) | {word for mapping in tables.load_table(name).vocabulary.values() for word in mapping}
    if name != "openrlhf":
        words |= words_of("recipe_parts")
    unread = [
        setting
        for setting, entry in tables.load_table(name).entries.items()
        if not entry.key and not entry.reason and setting not in words
    ]
    assert unread == []


@pytest.mark.parametrize("name", TABLES)
def test_every_vocabulary_is_read_by_the_module(name):
    assert set(tables.load_table(name).vocabulary) <= words_of(name)


@pytest.mark.parametrize("name", TABLES)
def test_every_group_is_read_by_the_module(name):
    assert {entry.group for entry in tables.load_table(name).entries.values()} - {""} <= words_of(name)


@pytest.mark.parametrize("name", TABLES)
def test_every_entry_with_a_key_or_a_reason_gives_an_outcome(name):
    table = tables.load_table(name)
    for setting, entry in table.entries.items():
        settings = Settings({setting: "x"}, find_place)
        if entry.refused:
            assert [fault.where for fault in table.find_refusals(settings)] == [setting]
            assert table.find_refusals(Settings({setting: False}, find_place)) == []
            continue
        outcomes = [*table.make_outcomes(settings), *table.make_lines(settings, entry.group)]
        if entry.reason:
            assert OmittedSetting(setting, entry.reason, entry.affects) in outcomes
        elif entry.key:
            assert RecipeLine(tuple(entry.key.split(".")), "x", (setting,), entry.note) in outcomes


HEAD = "tool: a\nreleases: b\nread_on: 2026-11-25\nsources: c\n"


@pytest.fixture
def load(tmp_path, monkeypatch):
    """Load a table from its text."""
    monkeypatch.setattr(tables, "get_path", lambda name: tmp_path / f"{name}.yaml")

    def call(text):
        (tmp_path / "x.yaml").write_text(HEAD + text)
        return tables.load_table.__wrapped__("x")

    return call


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("settings: {a: {kee: model.name_or_path}}", TypeError, "kee"),
        ("settings: {a: model.name_or_path}\nruels: [b]", TypeError, "ruels"),
        ("settings: {a: model.name_or_path}\nrules: {text: [a]}", ValueError, "settings in two places: a"),
        ("settings: {}\nomitted: {One: [a], Two: [a]}", ValueError, "settings in two places: a"),
    ],
)
def test_table_with_a_mistake_is_refused(load, text, error, message):
    with pytest.raises(error, match=message):
        load(text)


def test_default_is_a_line_with_a_note_and_a_setting_that_is_off_differs_in_nothing(load):
    text = "settings: {a: {key: train.seed, default: 3, note: Why.}}\nunsupported: {rows: [b]}\nomitted: {Reason: [c]}"
    table = load(f"{text}\nharmless: {{b: [1]}}")
    assert list(table.make_outcomes(Settings({}, find_place))) == [
        RecipeLine(("train", "seed"), 3, (), "Why. This is a's default.")
    ]

    def omit(**values):
        outcomes = table.make_outcomes(Settings(values, find_place))
        return [outcome for outcome in outcomes if isinstance(outcome, OmittedSetting)]

    assert omit(b=False, c=False) == [OmittedSetting("b", tables.OFF), OmittedSetting("c", "Reason.")]
    assert omit(b=1) == [OmittedSetting("b", tables.OFF)]
    assert omit(b=True) == [OmittedSetting("b", tables.UNSUPPORTED, "rows")]


def test_keys_of_a_mapping_inside_a_setting_are_audited(load):
    nested = "{rules: {text: [read]}, omitted: {Quiet: [quiet]}, unsupported: {mask: [loud]}, refused: {No: [other]}}"
    table = load(f"nested: {{source: {nested}}}")

    def audit(**values):
        return list(table.audit("source", Settings({"rows": [values]}, find_place), "rows", path=(0,)))

    assert audit(read="x", quiet=1, loud=2, lout=3, none=None) == [
        OmittedSetting("rows", "Quiet.", "", (0, "quiet")),
        OmittedSetting("rows", tables.UNSUPPORTED, "mask", (0, "loud")),
        OmittedSetting("rows", "trl_sft does not know this setting. Did you mean `loud`?", "unknown", (0, "lout")),
    ]
    with pytest.raises(RecipeError) as error:
        audit(read=1, other=True)
    assert [(fault.where, fault.code) for fault in error.value.faults] == [
        ("rows.0.read", "import.wrong_type"),
        ("rows.0.other", tables.OTHER_OBJECTIVE),
    ]
