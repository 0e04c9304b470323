"""The tables of the importers: well-formed, and every entry used."""

import ast
import datetime
from pathlib import Path

import pytest
import yaml

from trl_sft.importers import tables, writer
from trl_sft.importers.settings import OmittedSetting, RecipeLine, Settings
from trl_sft.recipe import sections, yaml_reader
from trl_sft.recipe.upstream import keys

TABLES = ("axolotl", "llamafactory", "openrlhf", "trl")


def words_of(name):
    """Every string in the code of a tool's module."""
    tree = ast.parse(tables.get_path(name).with_suffix(".py").read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


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
    assert table.releases in writer.render(
        next(importer for importer in writer.TOOLS.values() if importer.table == name),
        Settings({}, str),
        [],
        omitted=[],
    )


@pytest.mark.parametrize("name", TABLES)
def test_fields_of_every_entry_are_well_formed(name):
    for setting, entry in tables.load_table(name).entries.items():
        assert not (entry.key and entry.reason), setting
        assert entry.reason or not entry.warn, setting
        assert entry.key or not (entry.group or entry.note), setting
        for text in (entry.note, entry.reason):
            assert not text or (text.endswith(".") and not text.startswith(" ")), setting
        if entry.key:
            section, _, key = entry.key.partition(".")
            known = {*keys.get_fields(section), *sections.OWN_KEYS[section]} if section in sections.OWNERS else set()
            assert key in known, (setting, entry.key)
        if name == "openrlhf":
            assert entry.type in ("str", "int", "float", "switch"), setting
        else:
            assert (entry.flag, entry.type, entry.nargs) == ("", "str", None), setting


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
        outcomes = [
            *table.make_outcomes(Settings({setting: "x"}, str)),
            *table.make_lines(Settings({setting: "x"}, str), entry.group),
        ]
        if entry.reason:
            assert OmittedSetting(setting, entry.reason, entry.warn) in outcomes
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
        ("settings: {a: model.name_or_path}\nrules: [a]", ValueError, "settings in two places: a"),
        ("settings: {}\nomitted: {One: [a], Two: [a]}", ValueError, "settings in two places: a"),
    ],
)
def test_table_with_a_mistake_is_refused(load, text, error, message):
    with pytest.raises(error, match=message):
        load(text)


def test_default_is_a_line_with_a_note_and_a_warning_needs_a_value_that_is_on(load):
    table = load("settings: {a: {key: train.seed, default: 3, note: Why.}}\nunsupported: [b]\nomitted: {Reason: [c]}")
    assert list(table.make_outcomes(Settings({}, str))) == [
        RecipeLine(("train", "seed"), 3, (), "Why. This is a's default.")
    ]
    off = [
        outcome.name
        for outcome in table.make_outcomes(Settings({"b": False, "c": False}, str))
        if hasattr(outcome, "name")
    ]
    assert off == ["c"]
    on = [outcome for outcome in table.make_outcomes(Settings({"b": True}, str)) if isinstance(outcome, OmittedSetting)]
    assert on == [OmittedSetting("b", tables.UNSUPPORTED, warn=True)]
