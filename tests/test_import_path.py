"""`python -m trl_sft` imports no module from the current folder."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: trl_sft:skills}\n"
ROOT = Path(__file__).parents[1]


def start(folder, *words, **environment):
    """Run `python -m trl_sft` in a folder, with these environment variables only beside the usual ones."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    command = [sys.executable, "-m", "trl_sft", *words]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=120
    )


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    return tmp_path


MODULES = ["yaml", "random", "copy", "json", "pathlib", "typing", "argparse", "datasets", "torch", "rich", "email"]


@pytest.mark.parametrize("name", MODULES)
def test_file_of_the_current_folder_with_the_name_of_a_module_is_not_run(folder, name):
    (folder / f"{name}.py").write_text("open('RAN', 'w').close()\nraise SystemExit(9)\n")
    # the package is found through PYTHONPATH where it is not installed; that path is not the current folder
    done = start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=str(ROOT))
    assert not (folder / "RAN").exists()
    assert done.returncode == 0, done.stderr


def test_package_of_the_current_folder_with_the_name_of_a_module_is_not_run(folder):
    (folder / "yaml").mkdir()
    (folder / "yaml/__init__.py").write_text("open('RAN', 'w').close()\n")
    assert start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=str(ROOT)).returncode == 0
    assert not (folder / "RAN").exists()


def test_module_that_python_imports_before_the_package_is_named_and_ends_the_process(folder):
    (folder / "contextlib.py").write_text(Path(contextlib.__file__).read_text())
    done = start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=str(ROOT))
    assert done.returncode == 2
    assert "contextlib.py" in done.stderr
    assert "Rename the file" in done.stderr


def test_current_folder_that_pythonpath_names_stays_on_the_import_path(folder):
    (folder / "sitecustomize.py").write_text("")
    (folder / "rows.py").write_text("def keep(row): return row\n")
    done = start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=f"{ROOT}{os.pathsep}{folder}")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [f"{os.pathsep}{ROOT}", f"{ROOT}{os.pathsep}", f"{ROOT}{os.pathsep * 2}/elsewhere"])
def test_empty_entry_of_pythonpath_puts_the_current_folder_on_no_import_path(folder, path):
    (folder / "yaml.py").write_text("open('RAN', 'w').close()\n")
    done = start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    assert not (folder / "RAN").exists()


def test_module_that_python_takes_from_an_empty_entry_before_the_package_is_named(folder):
    (folder / "sitecustomize.py").write_text("")
    done = start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=f"{ROOT}{os.pathsep}")
    assert done.returncode == 2
    assert "sitecustomize.py" in done.stderr


def test_folder_with_the_name_of_the_package_is_not_taken_for_it(folder):
    (folder / "trl_sft").mkdir()
    (folder / "trl_sft/recipe.py").write_text("open('RAN', 'w').close()\n")
    assert start(folder, "check", "--fast", "recipe.yaml", PYTHONPATH=str(ROOT)).returncode == 0
    assert not (folder / "RAN").exists()


def test_checkout_as_the_current_folder_still_runs():
    done = start(ROOT, "--help")
    assert done.returncode == 0, done.stderr
