"""The reference is complete: every command, flag, exit code, key, format, error and file is documented."""

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tomllib

import pytest
from conftest import SHIPPED
from documents import GUIDES, ROOT

from trl_sft import cli, errors, run_folder
from trl_sft.building import spec_keys
from trl_sft.data import formats
from trl_sft.recipe import paths, renamed_keys, sections
from trl_sft.recipe.upstream import keys, types

REFERENCE = ROOT / "docs" / "reference"


def load_builder():
    """Return scripts/build_reference.py as a module."""
    spec = importlib.util.spec_from_file_location("build_reference", ROOT / "scripts" / "build_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


BUILDER = load_builder()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages with their generated parts, by path below docs/."""
    target = tmp_path_factory.mktemp("docs-source")
    BUILDER.write(ROOT / "docs", target)
    return {path.relative_to(target).as_posix(): path.read_text(encoding="utf-8") for path in target.rglob("*.md")}


def page(name):
    return (REFERENCE / name).read_text(encoding="utf-8")


def first_cells(text):
    """Return the code spans in the first cells of a page's tables."""
    rows = re.findall(r"^\| ([^|]*) \|", text, re.MULTILINE)
    return {span for row in rows for span in re.findall(r"`([^`]+)`", row)}


def parsers(monkeypatch):
    """Return the parser of each command; "" is the one that trains."""

    class ParserCalled(BaseException):
        pass

    command_parsers = {}
    for name in ("parse_args", "parse_intermixed_args"):

        def stop(self, *_, **__):
            raise ParserCalled(self)

        monkeypatch.setattr(argparse.ArgumentParser, name, stop)
    for command in ("", *cli.COMMANDS):
        with pytest.raises(ParserCalled) as error:
            cli.main([command or "recipe.yaml"])
        command_parsers[command] = error.value.args[0]
    return command_parsers


def test_every_command_is_documented_with_every_flag(monkeypatch):
    text = page("cli.md")
    for command, parser in parsers(monkeypatch).items():
        assert f"| `python -m trl_sft {command or 'RECIPE'}" in text, command
        flags = [flag for action in parser._actions for flag in action.option_strings]
        rows = [line for line in text.splitlines() if line.startswith((f"| `{command}` |", "| all |", "| (train) |"))]
        assert [flag for flag in flags if not any(re.search(rf"`{flag}\b", row) for row in rows)] == [], command


def test_commands_and_flags_of_the_page_exist(monkeypatch):
    flags = {flag for parser in parsers(monkeypatch).values() for a in parser._actions for flag in a.option_strings}
    named = set(re.findall(r"(?<![\w-])(--?[a-z][\w-]*)", page("cli.md").partition("## Exit codes")[0])) - {"-m"}
    assert named <= flags


def test_help_screen_names_every_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    screen = capsys.readouterr().out
    assert [command for command in cli.COMMANDS if f"trl_sft {command} " not in screen] == []


def test_every_exit_code_is_documented():
    codes = {value for name, value in vars(errors).items() if name.startswith("EXIT_") and name != "EXIT_SIGNAL"}
    codes |= {errors.EXIT_SIGNAL + number for number in (1, 2, 10, 13, 15)}  # SIGHUP, SIGINT, SIGUSR1, SIGPIPE, SIGTERM
    listed = re.findall(r"^\| (\d+) \|", page("cli.md"), re.MULTILINE)
    assert codes == set(map(int, listed))


def test_every_error_class_is_documented_with_its_exit_code():
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page("errors.md"), re.MULTILINE))
    classes = {n: c for n, c in vars(errors).items() if isinstance(c, type) and issubclass(c, BaseException)}
    assert set(classes) == {name for name in rows if name[0].isupper()}
    for name, value in classes.items():
        if issubclass(value, errors.UserError):
            assert rows[name] == str(value.exit_code)


def test_every_word_of_run_allow_is_documented():
    words = re.findall(r"'(\w+)'", sections.OWN_KEYS["run"]["allow"])
    assert len(words) >= 6
    assert set(words) <= first_cells(page("errors.md"))


def test_every_own_key_has_help_and_stands_in_a_handwritten_page():
    text = "\n".join(path.read_text(encoding="utf-8") for path in GUIDES)
    for section, own in sections.OWN_KEYS.items():
        for name in own:
            assert keys.get_help(section, name), (section, name)
            assert re.search(rf"\b{name}\b", text), (section, name)


def test_generated_keys_hold_every_key_of_every_section(pages):
    text = pages["reference/keys.md"]
    for section in BUILDER.key_sections():
        title = {keys.SOURCE: "One source"}.get(section, section)
        part = text.partition(f"\n### {title}")[2].partition("\n### ")[0]
        missing = [name for name in keys.get_fields(section) if f"| `{name}` |" not in part]
        assert missing == [], section


def test_generated_spec_holds_every_key_of_every_section(pages):
    text = pages["reference/spec.md"]
    for section, declared in spec_keys.SECTIONS.items():
        part = text.partition(f"\n### {section}\n")[2].partition("\n### ")[0]
        assert [name for name in declared if f"| `{name}` |" not in part] == [], section


def test_generated_renamed_keys_hold_every_old_name(pages):
    text = pages["reference/renamed-keys.md"]
    for section, table in renamed_keys.RENAMED_KEYS.items():
        part = text.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
        assert [name for name in table if f"| `{name}` |" not in part] == [], section


def test_generated_architecture_names_every_module_with_its_purpose(pages):
    text = pages["development/architecture.md"]
    modules = sorted((ROOT / "trl_sft").rglob("*.py"))
    assert len(modules) >= 80
    for path in modules:
        row = re.search(rf"^\| `{path.relative_to(ROOT).as_posix()}` \| (.*) \|$", text, re.MULTILINE)
        assert row, path
        assert len(row[1]) > 10, path


def test_architecture_names_every_package_in_its_layer(pages):
    packages = {path.parent.name for path in (ROOT / "trl_sft").glob("*/__init__.py")}
    listed = set(re.findall(r"^\| \d \| `(\w+)/` \|", pages["development/architecture.md"], re.MULTILINE))
    assert packages == listed


def test_help_screens_are_generated_for_every_command(pages):
    text = pages["reference/cli.md"]
    assert [command for command in cli.COMMANDS if f"### trl_sft {command}\n" not in text] == []
    assert text.count("usage: ") == len(cli.COMMANDS) + 1


def test_no_generated_part_is_left_empty(pages):
    for name, text in pages.items():
        assert "<!-- generated:" not in text, name
        assert "<!-- end -->" not in text, name


def test_the_site_builds_with_strict_links(tmp_path):
    pytest.importorskip("zensical", reason="`make docs` installs it")
    shutil.copy(ROOT / "zensical.toml", tmp_path)
    BUILDER.write(ROOT / "docs", tmp_path / "build" / "docs-source")
    command = [sys.executable, "-m", "zensical", "build", "--clean", "--strict"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "build" / "docs" / "reference" / "keys.html").is_file()


def test_every_format_is_documented_with_columns_and_rows_that_it_reads():
    text = page("formats.md")
    for name in sections.FORMATS:
        row_format = formats.FORMATS[name]
        columns = [
            ", ".join(f"`{column}`" for column in part) for part in (row_format.columns, row_format.optional_columns)
        ]
        assert f"| `{name}` | {columns[0]} | {columns[1]} |".replace("|  |", "| |") in text
        part = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        rows = re.findall(r"```json\n(.*?)```", part, re.DOTALL)
        assert rows, name
        for row in map(json.loads, rows):
            assert formats.recognise(row) == [name]
            assert row_format.read(row)


def test_every_wording_is_documented():
    text = (ROOT / "docs/how-to/formats-and-wordings.md").read_text(encoding="utf-8")
    assert set(types.list_choices(keys.get_fields(keys.SOURCE)["wording"])) <= first_cells(text)


@pytest.mark.parametrize(
    ("key", "file"),
    [("loss_on", "what-carries-loss.md"), ("overlong", "packing-and-long-rows.md")],
)
def test_every_choice_of_a_key_is_explained_in_its_how_to(key, file):
    text = (ROOT / "docs/how-to" / file).read_text(encoding="utf-8")
    assert set(types.list_choices(keys.get_fields("data")[key])) <= first_cells(text)


def test_templates_named_in_the_how_to_exist():
    text = (ROOT / "docs/how-to/template-for-a-base-model.md").read_text(encoding="utf-8")
    named = {word for word in first_cells(text) if re.fullmatch(r"[a-z0-9_]+", word)}
    assert len(named) >= 9
    assert named <= set(paths.list_templates())


def test_classes_and_tables_that_the_development_pages_name_exist():
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "trl_sft").rglob("*.py"))
    for path in (ROOT / "docs" / "development").glob("add-*.md"):
        spans = re.findall(r"`([A-Z][A-Za-z_]+)`", path.read_text(encoding="utf-8"))
        assert [word for word in spans if not re.search(rf"\b{word}\b", code) and word != "CHANGELOG"] == [], path.name


WHERE_IT_APPLIES = {"best", "stopped_early", "pushed", "answer_metric"}  # keys of run.json that only some runs have
RUN = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl, eval_fraction: 0.2}
train: {output_dir: out, max_steps: 2, per_device_train_batch_size: 2, save_steps: 1, logging_steps: 1}
evaluate: {max_rows: 2, generation: {max_new_tokens: 2}}
"""


def test_every_file_of_a_run_folder_is_documented_with_its_keys(go, here):
    code, _, err = go(RUN)
    assert code == 0, err
    text = page("run-folder.md")
    files = {re.sub(r"-\d+$", "-N/", path.name) for path in (here / "out").iterdir()}
    named = [
        value for name, value in vars(run_folder).items() if re.fullmatch("[A-Z]+", name) and isinstance(value, str)
    ]
    constants = {value for value in named if "." in value[1:]}
    assert {run_folder.RUN, run_folder.REJECTS} <= files & constants
    assert sorted((files | constants) - first_cells(text)) == []
    for name in (run_folder.RUN, run_folder.LEDGER, run_folder.EVAL):
        part = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        values = json.loads((here / "out" / name).read_text(encoding="utf-8"))
        assert [key for key in values if f"`{key}`" not in part] == [], name
        if name == run_folder.LEDGER:
            inner = [key for value in values["train"].values() if isinstance(value, dict) for key in value]
            assert [key for key in (*values["train"], *inner) if f"`{key}`" not in part] == []
        if name == run_folder.RUN:
            rows = re.findall(r"^\| ([^|]*) \|", part, re.MULTILINE)
            assert {span for row in rows for span in re.findall(r"`(\w+)`", row)} - WHERE_IT_APPLIES == set(values)
            assert [key for key in values["measured"] if f"`{key}`" not in part] == []


def test_every_extra_is_documented_with_its_packages():
    page = (ROOT / "docs" / "reference" / "extras.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \|.*?\|(.*?)\|", page, re.MULTILINE))
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert set(rows) == set(extras)
    for extra, requirements in extras.items():
        names = {re.match(r"[\w-]+", requirement)[0] for requirement in requirements} - {"transformers"}
        assert all(name in rows[extra] for name in names), extra


def test_the_quickstart_ships_what_the_documents_name():
    assert (SHIPPED / "tiny").is_dir()
    assert (SHIPPED / "skills").is_dir()
