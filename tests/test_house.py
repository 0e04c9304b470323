"""The house holds: layers, sizes, frozen keys, no upstream name re-declared, documents that tell the truth."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SHIPPED

from trl_sft import cli, keys, load_recipe, owners, paths, recipe, rundir, schema, surface, training

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_sft"
MODULES = sorted(PACKAGE.glob("*.py"))

LAYERS = {
    **dict.fromkeys(["__init__", "errors"], 0),
    **dict.fromkeys(
        ["recipe", "definitions", "surface", "paths", "turns", "rundir", "console", "textfiles", "metrics"], 1
    ),
    **dict.fromkeys(["special_tokens", "rendering"], 1),
    **dict.fromkeys(["owners", "run", "hub", "unused", "wordings", "masks", "mixing"], 2),
    **dict.fromkeys(["values", "formatting", "marking", "rules", "launching", "trust"], 3),
    **dict.fromkeys(["tokens", "named", "sources", "conversion", "chat", "model", "machine", "loss", "attention"], 4),
    **dict.fromkeys(["keys", "kernels"], 4),
    **dict.fromkeys(["nested", "old_names", "source_rows", "record", "rendered", "live", "shadow", "sketch"], 5),
    **dict.fromkeys(["mapping", "data", "prepared", "foreign", "asked", "tally"], 6),
    **dict.fromkeys(["schema", "ledger", "streams", "watch", "memory"], 7),
    **dict.fromkeys(["openrlhf_flags", "axolotl_names", "axolotl_rows", "llamafactory_rows"], 7),
    **dict.fromkeys(["dataset", "screens", "explain", "json_schema"], 8),
    **dict.fromkeys(["from_trl", "from_openrlhf", "from_axolotl", "from_llamafactory"], 8),
    **dict.fromkeys(["evaluate", "gains"], 9),
    **dict.fromkeys(["callbacks", "init", "ending", "convert"], 10),
    "rehearsal": 11,
    "training": 12,
    **dict.fromkeys(["preview", "check", "probe"], 13),
    "cli": 14,
    "__main__": 15,
}


def imports(path):
    """Return the modules of ours that a module imports when it is imported; not those inside functions."""
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and node.module == "trl_sft":
            found |= {alias.name for alias in node.names if alias.name in LAYERS}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trl_sft."):
            found.add(node.module.partition(".")[2])
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_go_downwards_only(path):
    assert path.stem in LAYERS, "a new module needs a layer here and in docs/design.md"
    above = {name for name in imports(path) if LAYERS[name] >= LAYERS[path.stem]}
    assert above == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_files_functions_and_parameters_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 7, node.name  # self and six


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_own_keys_are_frozen():
    """A new own key is a deliberate change: here, in the README, and with a reason why upstream can't own it."""
    assert {name: set(keys) for name, keys in surface.OWN_KEYS.items()} == {
        "model": {"name_or_path"},
        "tokenizer": {"chat_template", "chat_template_kwargs"},
        "quantization": set(),
        "lora": set(),
        "data": {
            *("train", "eval", "eval_fraction", "loss_on", "overlong", "special_tokens_in_text"),
            *("drop_leaked", "max_untrained"),
        },
        "data.*": {"path", "format", "wording", "rename", "task", "weight", "max_rows"},
        "train": set(),
        "evaluate": {"metrics", "max_rows", "generation"},
        "launch": {"engine", "config"},
        "run": {"resume", "overwrite", "allow", "max_hours", "logits_gib", "global_batch_size"},
    }


def test_own_keys_and_owners_names_are_disjoint():
    for section, (_, definition) in surface.OWNERS.items():
        if definition:
            assert not set(owners.fields(definition)) & set(surface.OWN_KEYS[section]), section
    for section, words in surface.KEYWORDS.items():
        assert not set(words) & set(surface.OWN_KEYS[section]), section
    for builder in set(surface.BUILDERS.values()):
        theirs = set(owners.fields(keys.builder_config(builder))) | set(owners.arguments(surface.LOAD_DATASET[1])) - {
            "path"
        }
        assert not theirs & set(surface.OWN_KEYS["data.*"]), builder


def test_refused_keys_exist_in_their_owner():
    """A refusal of a key that upstream dropped is dead; the owner's absence of it says enough."""
    for section, refused in surface.REFUSED.items():
        if section == "data.*":
            theirs = owners.arguments(surface.LOAD_DATASET[1])
        elif section == keys.GENERATION:
            theirs = owners.popped(surface.GENERATION[1])
        elif surface.OWNERS[section][1]:
            theirs = owners.fields(surface.OWNERS[section][1])
        else:
            continue
        reserved = {"quant_method"}  # an attribute of every quantization's config, no argument of this one's
        assert set(refused) - reserved <= set(theirs), section


def test_no_module_names_what_upstream_owns():
    """`learning_rate` and its like pass through; no module of ours knows them."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        writes = path.stem in ("init", "openrlhf_flags", "axolotl_names") or path.stem.startswith("from_")
        assert "learning_rate" not in text or writes, path.stem  # these write recipes


def test_from_recipe_to_trainer_is_three_hops_and_a_sitting(here, monkeypatch):
    """recipe.read -> schema.build -> training.run: the whole functions of these rooms that a recipe passes."""
    rooms = {module.__file__: module for module in (recipe, schema, training)}
    passed = set()

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename in rooms:
            passed.add((frame.f_code.co_filename, frame.f_code.co_firstlineno))

    class Reached(BaseException):
        pass

    def stop(*_, **__):
        sys.setprofile(None)
        raise Reached

    monkeypatch.setattr(training.SFTTrainer, "train", stop)
    monkeypatch.setattr(paths, "EMBEDDED", SHIPPED)
    sys.setprofile(note)
    try:
        with pytest.raises(Reached):
            training.run(
                schema.build(recipe.read(ROOT / "recipes" / "quickstart.yaml", ["train.max_steps=2"])), rundir.Claim()
            )
    finally:
        sys.setprofile(None)
    lines = set()
    for file in rooms:
        for node in ast.walk(ast.parse(Path(file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                calls = [n.lineno for n in ast.walk(node) if isinstance(n, ast.Attribute) and n.attr == "train"]
                last = (
                    min(calls) if node.name == "_carry_out" else node.end_lineno
                )  # what follows trainer.train() is after
                if (file, first) in passed:
                    lines |= {(file, n) for n in range(first, last + 1)}
    assert 200 < len(lines) <= 370, len(lines)


def test_commands_in_documents_exist():
    """Every `make TARGET` and every command line of ours in README and recipes is one that works."""
    targets = set(re.findall(r"^([a-z]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [ROOT / "README.md", *(ROOT / "recipes").rglob("*.yaml"), *(ROOT / "docs").glob("*.md")]
    for path in texts:
        text = path.read_text(encoding="utf-8")
        assert set(re.findall(r"`?make ([a-z]+)", text)) <= targets | {"alone"}, path.name
        for line in re.findall(r"python -m trl_sft (.*)", text):
            words = shlex.split(line.split("#")[0].replace("`", "").replace("[", "").replace("]", ""))
            assert words[0].endswith((".yaml", "RECIPE")) or words[0] in cli._COMMAND or words[0] in ("-h", "--help"), (
                line
            )


def test_makefile_lists_what_it_does():
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    wanted = "install quickstart train check test prove lint notebooks bench clean".split()
    assert [name for name in wanted if f"make {name} " not in done.stdout] == []


def test_readme_names_every_file_of_the_package():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [p.name for p in MODULES if not p.name.startswith("__") and f"trl_sft/{p.name}" not in text] == []


def test_readme_recipe_is_accepted(here):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    body = (
        re.search(r"```yaml\n(.*?)```", text, re.DOTALL).group(1).replace("Qwen/Qwen2.5-0.5B-Instruct", "trl_sft:tiny")
    )
    assert len(body.splitlines()) <= 11
    (here / "my-rows.jsonl").write_text((here / "rows.jsonl").read_text())
    (here / "recipe.yaml").write_text(body)
    assert load_recipe("recipe.yaml").lora


def test_nothing_tracked_carries_a_path_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if path.suffix in (".safetensors",) or not path.is_file() or path == Path(__file__):
            continue
        assert not re.search(r"/(work|root|home|Users)/\w", path.read_text(encoding="utf-8")), name
