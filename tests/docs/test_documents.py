"""Commands, recipes, links and examples of the documents are real."""

import argparse
import re
import subprocess
import tomllib
from pathlib import Path

import documents
import pytest
import yaml
from conftest import SHIPPED, jsonl
from documents import GUIDES, PAGES, RECIPES, ROOT

from trl_sft import cli, load_recipe
from trl_sft.building import spec as building_spec
from trl_sft.building import spec_keys
from trl_sft.recipe import paths
from trl_sft.run_folder import write_text

COMMANDS = documents.command_lines()
OTHER_YAML = {"log.md", "task-suites.md"}  # the latter has a task of lm-eval, which test_task_suites.py loads
YAML = [block for block in documents.blocks("yaml") if block.path.name not in OTHER_YAML]


class Parsed(BaseException):
    """A command line that its own parser accepted."""


@pytest.fixture
def parsers_only(monkeypatch):
    """Stop every command once its parser has accepted the words."""
    for name in ("parse_args", "parse_intermixed_args"):
        original = getattr(argparse.ArgumentParser, name)

        def parse(self, words=None, namespace=None, original=original):
            raise Parsed(self, original(self, words, namespace))

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)


@pytest.fixture
def shipped(monkeypatch):
    """`trl_sft:tiny` and `trl_sft:skills` are the ones of the package."""
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)


def test_documents_are_found():
    assert len(PAGES) >= 25
    assert len(COMMANDS) >= 40
    assert len(YAML) >= 15
    assert len(RECIPES) >= 9


@pytest.mark.parametrize(("place", "words"), COMMANDS, ids=[f"{p}: {' '.join(w)}" for p, w in COMMANDS])
def test_a_command_line_is_accepted_by_the_parser_of_its_command(place, words, parsers_only):
    if not words or {"-h", "--help", "--version"} & set(words):
        return
    with pytest.raises(Parsed):
        cli.main(words)
    others = (
        "audit",
        "launch",
        "build",
        "init",
        "import",
        "explain",
        "report",
        "runs",
        "schema",
        "chat",
        "merge",
        "judge",
        "votes",
        "export",
        "evaluate",
        "bisect",
        "suspects",
        "serve",
    )
    if words[0] not in others:
        assert words[1 if words[0] in ("check", "fix", "preview", "prepare") else 0].endswith((".yaml", "RECIPE"))


def test_overrides_of_documented_commands_are_accepted(here, shipped):
    recipe = here / "recipe.yaml"
    recipe.write_text(
        "model: {name_or_path: trl_sft:tiny}\nlora: {r: 4}\ndata: {train: rows.jsonl}\n", encoding="utf-8"
    )
    (here / "spec.yaml").write_text(SPEC, encoding="utf-8")
    pattern = r"[a-z_]+(\.[a-z_]+)*="
    overrides = {(words[0] == "build", word) for _, words in COMMANDS for word in words if re.match(pattern, word)}
    assert len(overrides) >= 5
    for is_spec, override in overrides:
        if override == "section.key=value":
            continue
        if is_spec:
            building_spec.load_spec("spec.yaml", [override])
        else:
            load_recipe(recipe, [override])


def test_make_targets_in_documents_exist():
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert [(place, target) for place, target in documents.make_targets() if target not in targets] == []


def test_makefile_lists_what_it_does():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = "install quickstart train check test prove lint docs notebooks bench clean".split()
    assert [name for name in wanted if f"make {name} " not in done.stdout] == []


def test_scripts_that_documents_run_exist():
    named = {
        (documents.name_of(path), script)
        for path in GUIDES
        for script in re.findall(
            r"\b((?:benchmarks|scripts|tests|recipes|notebooks|trl_sft)/[\w./-]+\.\w+)", path.read_text("utf-8")
        )
    }
    assert len(named) > 30
    assert [item for item in sorted(named) if not (ROOT / item[1]).is_file()] == []


def prepare_files(folder, text):
    """Make the files that a recipe of a document names: rows, and the function of its page."""
    jsonl(folder / "rows.jsonl", [{"question": "What is 1 plus 1?", "answer": "2"}])
    for name in re.findall(r"[\w-]+\.jsonl", text):
        jsonl(folder / name, [{"question": "What is 1 plus 1?", "answer": "2"}])
    write_text(folder / "rows.py", "def to_chat(row):\n    return row\n")
    write_text(folder / "my-template.jinja", "{{ messages }}")


SPEC = """\
plan: {rows: 10}
seeds: {topics: [rivers]}
axes: {difficulty: [easy]}
templates: {families: [basic], files: []}
generator: {endpoint: http://127.0.0.1:1/v1, model: m}
"""


def check_spec_part(text, here):
    """Check a part of a spec, or a file of templates, that a document shows."""
    values, whole = yaml.safe_load(text), yaml.safe_load(SPEC)
    if "family" in values:
        (here / "mine.yaml").write_text(text, encoding="utf-8")
        values = {"templates": {"families": [values["family"]], "files": ["mine.yaml"]}}
    (here / "spec.yaml").write_text(yaml.safe_dump(whole | values), encoding="utf-8")
    assert building_spec.load_spec("spec.yaml").folder


@pytest.mark.parametrize("block", YAML, ids=[block.place for block in YAML])
def test_a_recipe_or_a_spec_in_a_document_is_accepted(block, here, shipped):
    prepare_files(here, block.text)
    if "family" in yaml.safe_load(block.text) or {*yaml.safe_load(block.text)} <= {*spec_keys.SECTIONS}:
        check_spec_part(block.text, here)
        return
    (here / "recipe.yaml").write_text(block.text, encoding="utf-8")
    assert load_recipe("recipe.yaml").output_dir


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_shipped_recipe_is_accepted_and_says_what_it_was_measured_with(path, shipped):
    text = path.read_text(encoding="utf-8")
    template = re.search(r"chat_template: (\w+)", text)
    if template and template[1] not in paths.list_templates():
        pytest.skip(f"the installed TRL has no template {template[1]}")
    assert load_recipe(path).output_dir
    assert [word for word in ("Goal", "Command", "Hardware", "Result") if f"\n# {word}: " not in text] == []


def test_relative_links_and_anchors_resolve():
    all_links = documents.links()
    broken = []
    for path, target in all_links:
        if target.startswith(("https://", "http://")):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        if not aim.exists() or (anchor and anchor not in documents.anchors(aim)):
            broken.append(f"{documents.name_of(path)}: {target}")
        if path in PAGES and not aim.is_relative_to(ROOT / "docs"):
            broken.append(f"{documents.name_of(path)}: {target} leaves docs/, where the built pages end")
    assert len(all_links) >= 100
    assert broken == []


def test_every_page_is_in_the_navigation_once():
    settings = tomllib.loads((ROOT / "zensical.toml").read_text(encoding="utf-8"))

    def leaves(item):
        values = item.values() if isinstance(item, dict) else item
        return [item] if isinstance(item, str) else [leaf for value in values for leaf in leaves(value)]

    assert sorted(leaves(settings["project"]["nav"])) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in PAGES)


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_readme_is_short_and_its_recipe_fits_on_a_screen(name):
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    assert 60 <= len(lines) <= 120
    recipe = documents.blocks("yaml", [ROOT / name])
    assert len(recipe) == 1
    assert len(recipe[0].text.splitlines()) <= 12


def test_the_readme_names_six_files_to_dive_into():
    part = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Dive into the code")[2]
    files = re.findall(r"^\d\. \[`([\w/.]+)`\]\(([\w/.]+)\)", part, re.MULTILINE)
    assert len(files) == 6
    assert all(shown == target and Path(ROOT / target).is_file() for shown, target in files)
