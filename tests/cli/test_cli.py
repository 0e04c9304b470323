"""The command line: help, version, init, check, exit codes, what is imported."""

import logging
import os
import re
import subprocess
import sys

import pytest
from conftest import RECIPE, jsonl

from trl_sft import __version__, cli, console, load_recipe, upstream_warnings
from trl_sft.recipe import paths

HEAVY = {"torch", "transformers", "trl", "datasets", "peft", "accelerate", "numpy", "pyarrow", "pandas"}


@pytest.mark.parametrize("words", [["--help"], ["-h"], ["init", "--help"], ["check", "--help"], ["x.yaml", "--help"]])
def test_help_of_each_command_exits_with_0(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    assert "python -m trl_sft" in capsys.readouterr().out


def test_no_arguments_show_the_help(capsys):
    assert cli.main([]) == 0
    assert "commands (a first word" in capsys.readouterr().out


def test_help_names_only_commands_that_exist(capsys):
    cli.main([])
    named = set(re.findall(r"python -m trl_sft ([a-z]+) ", capsys.readouterr().out))
    assert named == set(cli.COMMANDS)


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out == f"trl_sft {__version__}\n"


@pytest.mark.parametrize("words", [["--verbose"], ["init"], ["init", "m"], ["check"], ["r.yaml", "--max_steps", "3"]])
def test_wrong_arguments_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("words", "closed_streams"),
    [
        (["explain", "train.packing"], ("stdout",)),
        (["explain", "train.packing"], ("stdout", "stderr")),
        (["schema"], ("stdout",)),
        (["check", "missing.yaml"], ("stdout", "stderr")),
    ],
)
def test_command_whose_output_nothing_reads_ends_quietly_with_141(words, closed_streams, unbuffered, here):
    """As in `trl_sft explain KEY | head -1`, and with standard error in the same pipe."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        process = subprocess.run(
            [sys.executable, "-m", "trl_sft", *words],
            stdout=writer,
            stderr=writer if "stderr" in closed_streams else subprocess.PIPE,
            cwd=here,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    finally:
        os.close(writer)
    assert process.returncode == 141
    assert not process.stderr


def test_broken_pipe_that_is_not_the_output_is_raised(monkeypatch):
    def write_to_a_closed_pipe(_):
        raise BrokenPipeError

    monkeypatch.setitem(cli.COMMANDS, "explain", write_to_a_closed_pipe)
    with pytest.raises(BrokenPipeError):
        cli.main(["explain", "train.packing"])


@pytest.mark.parametrize("words", ["--help", "--version", "RECIPE"])
def test_light_commands_import_nothing_heavy(words, here):
    """--help, --version and the reading of a recipe import none of the packages that take seconds."""
    (here / "recipe.yaml").write_text(RECIPE)
    call = "trl_sft.load_recipe('recipe.yaml')" if words == "RECIPE" else f"trl_sft.cli.main([{words!r}])"
    code = (
        "import sys, trl_sft.cli\n"
        f"try: {call}\nexcept SystemExit: pass\n"
        "print(sorted(m for m in sys.modules if '.' not in m), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(eval(done.stderr))


def test_init_writes_a_recipe_that_runs_as_it_is(here, capsys, matches):
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 0
    out = capsys.readouterr().out.replace(console.get_python_command(), "python")
    matches("init", (here / "recipe.yaml").read_text() + "---\n" + out)
    run = load_recipe("recipe.yaml", ["train.max_steps=1"])
    assert run.sources["train"][0].format == "question_answer"
    assert cli.main(["recipe.yaml", "train.max_steps=1", "train.save_strategy=no"]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "steps 1, which is 0.111 epochs" in out
    assert "the only step has learning rate 0, since the warm-up begins with 0: nothing is learned." in out


def test_init_writes_paths_relative_to_the_recipe(here):
    (here / "recipes").mkdir()
    (here / "data").mkdir()
    jsonl(here / "data" / "a b.jsonl", [{"instruction": "a", "output": "b"}])
    assert cli.main(["init", "trl_sft:tiny", "data/a b.jsonl", "-o", "recipes/mine.yaml"]) == 0
    source = load_recipe("recipes/mine.yaml").sources["train"][0]
    assert source.location.files == (here / "data" / "a b.jsonl",)
    assert source.format == "alpaca"


def test_init_overwrites_nothing_and_leaves_nothing_when_it_fails(here, capsys):
    (here / "recipe.yaml").write_text("mine")
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl"]) == 2
    assert (here / "recipe.yaml").read_text() == "mine"
    assert cli.main(["init", "trl_sft:tiny", "gone.jsonl", "-o", "b.yaml"]) == 2
    assert cli.main(["init", "./gone", "rows.jsonl", "-o", "b.yaml"]) == 2
    assert cli.main(["init", "trl_sft:tiny", "rows.jsonl", "-o", "no/b.yaml"]) == 2
    assert sorted(p.name for p in here.iterdir()) == ["recipe.yaml", "rows.jsonl"]
    err = capsys.readouterr().err
    assert "this file exists already; it is left unchanged" in err
    assert "DATA data.train\n    gone.jsonl: there is no such file or folder" in err
    assert "MODEL model.name_or_path\n    ./gone: there is no such file or folder" in err


def test_check_finds_faults_in_rows_and_writes_nothing(go, here):
    code, out, _ = go(RECIPE, command=["check"])
    assert code == 0
    assert " -m trl_sft recipe.yaml" in out
    jsonl(here / "rows.jsonl", [{"question": "a", "answer": None}])
    assert go(RECIPE, command=["check"])[0] == 2
    assert not (here / "out").exists()


def test_run_without_a_terminal_shows_no_noise_of_upstream(here):
    """A whole run from the shell: no warning of upstream, no progress bar."""
    (here / "recipe.yaml").write_text(RECIPE.replace("trl_sft:tiny", str(paths.EMBEDDED / "tiny")))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TQDM")}
    done = subprocess.run(
        [sys.executable, "-m", "trl_sft", "recipe.yaml"],
        check=False,
        **{"cwd": here, "capture_output": True, "text": True, "env": environment},
    )
    assert done.returncode == 0
    assert done.stderr == ""


def test_warning_of_transformers_is_shown_once(here):
    """transformers adds a handler to its logger while it is imported inside the quiet block."""
    (here / "recipe.yaml").write_text(RECIPE)
    code = (
        "import logging, trl_sft\n"
        "run = trl_sft.load_recipe('recipe.yaml')\n"
        "import trl_sft.training.run as t\n"
        "import trl_sft.reports.page as p\n"
        "t.run = lambda *_: logging.getLogger('transformers.trainer').warning('look here')\n"
        "p.write_at_end = lambda folder: None\n"
        "trl_sft.train(run)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=True)
    assert done.stderr.count("look here") == 1
    assert "note from transformers: look here" in done.stderr


def test_warning_that_matters_reaches_the_user_once(go):
    code, _, err = go(
        RECIPE,
        "train.packing_strategy=wrapped",
        "train.padding_free=true",
        "train.packing=true",
        "run.allow=[leaking_packing]",
    )
    assert code == 0
    assert err.count("note from trl: You are passing `padding_free=True` with the 'wrapped'") == 1


def test_upstreams_handlers_are_restored_after_the_quiet_block():
    """Inside the block a package cannot add a handler; after it everything is as before."""
    logger = logging.getLogger("transformers")
    before = (logger.handlers[:], logger.propagate, logger.level)
    with upstream_warnings.quiet():
        logger.addHandler(logging.StreamHandler())
        assert [type(handler).__name__ for handler in logger.handlers] == ["_OnceHandler"]
    assert (logger.handlers, logger.propagate, logger.level) == before
    handler = logging.NullHandler()
    logger.addHandler(handler)
    assert handler in logger.handlers
    logger.removeHandler(handler)
