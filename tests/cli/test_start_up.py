"""What each command imports: nothing that it does not use."""

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from conftest import RECIPE
from packaging.version import Version

from trl_sft import cli
from trl_sft.recipe import paths

COMMANDS = """
import contextlib, io, json, sys
from trl_sft import cli
from trl_sft.recipe import paths
paths.EMBEDDED = paths.Path(sys.argv[1])
for words in json.loads(sys.argv[2]):
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        assert not cli.main(words), words
print(json.dumps([name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]))
"""
BARE = """
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
AutoModelForCausalLM.from_pretrained(sys.argv[1])
AutoTokenizer.from_pretrained(sys.argv[1])
print(json.dumps([name for name in sys.modules if name.partition(".")[0] not in sys.stdlib_module_names]))
"""
# what a step, its optimizer and its checkpoint import of torch and numpy, beside what loading a model does
OF_TRAINING = {"torch.profiler", "torch.utils", "numpy.ctypeslib", "torch.distributed", "torch.optim", "torch.nn"}
OF_TRAINING |= {"torch._subclasses"}  # and what a step without numbers does, by which memory is counted
LIGHT = {"__main__", "trl_sft", "yaml", "_yaml", "_distutils_hack", "cython_runtime"}


# TRL 1.8 imports peft and bitsandbytes later than 1.16 does, and torch comes with a tokenizer there
NEWEST = pytest.mark.skipif(
    Version(version("trl")) < Version("1.16"), reason="older versions import other modules, at other times"
)


def modules(code, *words):
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.strip().splitlines()[-1]))


def of(*commands):
    return modules(COMMANDS, str(paths.EMBEDDED), json.dumps(commands))


def tops(names):
    """Return packages, less those that Cython makes for itself."""
    return {name.partition(".")[0] for name in names if not name.startswith("_cython")}


def test_help_and_reading_a_recipe_import_yaml_alone(here):
    (here / "recipe.yaml").write_text(RECIPE)
    words = [[name, "--help"] for name in cli.COMMANDS]
    assert tops(of(["--help"], *words)) <= LIGHT - {"yaml", "_yaml"}
    assert tops(of(["check", "recipe.yaml", "--fast"])) <= LIGHT


def test_fault_of_a_recipe_is_shown_without_heavy_imports(here):
    (here / "recipe.yaml").write_text(RECIPE + "trian: {}\n")
    code = COMMANDS.replace("assert not cli", "assert 2 == cli")
    for words in (["recipe.yaml"], ["check", "recipe.yaml"], ["preview", "recipe.yaml"]):
        assert tops(modules(code, str(paths.EMBEDDED), json.dumps([words]))) <= LIGHT


def test_folder_of_a_finished_run_is_refused_without_heavy_imports(here):
    (here / "recipe.yaml").write_text(RECIPE)
    (here / "out").mkdir()
    (here / "out" / "run.json").write_text('{"outcome": "done"}')
    code = COMMANDS.replace("assert not cli", "assert 2 == cli")
    assert tops(modules(code, str(paths.EMBEDDED), json.dumps([["recipe.yaml"]]))) <= LIGHT


@NEWEST
def test_init_reads_rows_and_tokenizer_without_torch(here):
    imported = tops(of(["init", "trl_sft:tiny", "rows.jsonl", "-o", "new.yaml"]))
    assert not imported & {"torch", "trl", "peft", "accelerate", "bitsandbytes", "rich", "sympy"}


@NEWEST
def test_a_run_imports_what_upstream_imports_to_load_its_model_and_no_more(here):
    (here / "recipe.yaml").write_text(RECIPE)
    bare = modules(BARE, str(paths.EMBEDDED / "tiny"))
    imported = of(["check", "recipe.yaml"], ["prepare", "recipe.yaml"], ["preview", "recipe.yaml"], ["recipe.yaml"])
    more = {name for name in imported - bare if name.partition(".")[0] not in LIGHT}
    assert {name for name in more if not any(f"{name}.".startswith(f"{one}.") for one in OF_TRAINING)} == set()
    assert len(more) <= 20, more


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="a kernel without huge pages")
@pytest.mark.parametrize(("set_by_user", "huge"), [({}, True), ({"THP_MEM_ALLOC_ENABLE": "0"}, False)])
def test_large_tensors_of_a_run_lie_in_huge_pages_unless_the_user_says_otherwise(set_by_user, huge, here, monkeypatch):
    (here / "recipe.yaml").write_text(RECIPE)
    monkeypatch.delenv("THP_MEM_ALLOC_ENABLE", raising=False)
    for name, value in set_by_user.items():
        monkeypatch.setenv(name, value)
    code = COMMANDS.rpartition("print")[0] + (
        "import torch\n"
        "large, inside = torch.ones(2**23), False\n"
        "for line in open('/proc/self/smaps'):\n"
        "    first, _, rest = line.partition(' ')\n"
        "    if '-' in first and ':' not in first:\n"
        "        start, end = (int(part, 16) for part in first.split('-'))\n"
        "        inside = start <= large.data_ptr() < end\n"
        "    elif inside and first == 'VmFlags:':\n"
        "        print(json.dumps(rest.split()))\n"
    )
    assert ("hg" in modules(code, str(paths.EMBEDDED), json.dumps([["recipe.yaml", "train.max_steps=1"]]))) == huge
