"""The structure holds: layers, sizes, frozen keys, no upstream name declared again."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from trl_sft.data import formats
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields, keys

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_sft"
MODULES = sorted(PACKAGE.rglob("*.py"))
AT_LEAST = 90  # modules: a search that finds fewer has stopped looking

# Packages import only from lower layers; siblings of one layer never import each other.
LAYERS = {
    **dict.fromkeys(["errors", "console", "run_folder", "suggestions", "upstream_warnings"], 1),
    "recipe": 2,
    **dict.fromkeys(["data", "model", "importers"], 3),
    **dict.fromkeys(["tokenization", "evaluation"], 4),
    "training": 5,
    "cli": 6,
    **dict.fromkeys(["__init__", "__main__"], 7),  # the public functions
}


def module_name(path):
    """`trl_sft/data/rows.py` -> `data.rows`; a package is named like its folder."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {module_name(path) for path in MODULES}


def imports(path):
    """Yield every module of ours that a file imports, at its top or inside a function, with the names taken."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "trl_sft":
                    yield alias.name.partition(".")[2] or "__init__", []
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if (node.module or "").partition(".")[0] != "trl_sft":
                continue
            package = node.module.partition(".")[2]
            for alias in node.names:
                module = f"{package}.{alias.name}".strip(".")
                if module in NAMES:
                    yield module, []
                else:
                    yield package or "__init__", [alias.name]


def layer(module):
    return LAYERS[module.partition(".")[0]]


def test_every_module_is_found_and_has_a_layer():
    assert len(MODULES) >= AT_LEAST
    assert {name.partition(".")[0] for name in NAMES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_imports_go_to_lower_layers_only(path):
    name = module_name(path)
    top = name.partition(".")[0]
    wrong = []
    for module, names in imports(path):
        other = module.partition(".")[0]
        if names == ["__version__"]:  # of the package, no module
            continue
        if other == top or (layer(name) == layer(module) == 1):
            continue
        if top == "cli" and module == "__init__" and set(names) <= {"load_recipe", "train"}:
            continue  # the command line calls what a program calls
        if layer(module) >= layer(name):
            wrong.append(module)
    assert wrong == []


def test_no_cycle_inside_a_package():
    graph = {module_name(path): {module for module, _ in imports(path)} & NAMES for path in MODULES}
    # A package's own __init__ stands for its entry; an import of a submodule names the submodule.
    done, open_ = set(), []

    def visit(module):
        assert module not in open_, " -> ".join([*open_[open_.index(module) :], module])
        if module in done:
            return
        open_.append(module)
        for other in sorted(graph[module]):
            if other != "__init__" and module not in ("__init__", "__main__"):
                visit(other)
        open_.pop()
        done.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_private_names_stay_in_their_package(path):
    name = module_name(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = {}  # local name -> module of ours
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trl_sft":
            package = node.module.partition(".")[2]
            for alias in node.names:
                module = f"{package}.{alias.name}".strip(".")
                outside = (module if module in NAMES else package).partition(".")[0] != name.partition(".")[0]
                dunder = alias.name.startswith("__")
                assert not (outside and alias.name.startswith("_") and not dunder), f"{module} is private"
                if module in NAMES and outside:
                    aliases[alias.asname or alias.name] = module
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            assert not node.attr.startswith("_") or node.attr.startswith("__"), (
                f"{aliases[node.value.id]}.{node.attr} is private"
            )


def test_class_names_mean_one_thing_in_the_package():
    homes = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module_name(path))
    assert {name: where for name, where in homes.items() if len(where) > 1} == {}


def test_tests_mirror_the_packages():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    packages = {path.parent.relative_to(PACKAGE) for path in MODULES if path.name == "__init__.py"}
    assert folders - {Path("docs")} <= packages, "a folder of tests has the name of a package"
    assert {Path(name) for name, number in LAYERS.items() if 1 < number < 7} <= folders


def test_formats_of_the_recipe_are_those_that_rows_are_read_in():
    assert tuple(formats.FORMATS) == sections.FORMATS


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_files_functions_and_parameters_stay_small(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            assert len(node.args.args) + len(node.args.kwonlyargs) <= 7, node.name  # self and six


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_every_module_says_what_it_is_for(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


STAGE_CALLS = {  # what only the stages of a run call: training, check, preview, prepare and the probe share them
    "SFTConfig(": {"training.stages"},
    "load.find_model(": {"training.stages"},
    "tokenizer.load(": {"training.stages"},
    "build.tokenize(": {"training.stages"},
    "data_rows.load(": {"training.stages", "cli.check.report"},  # check looks at columns where no tokenizer loads
    "SFTTrainer(": {"training.stages", "training.dry_run"},
}


@pytest.mark.parametrize("call", STAGE_CALLS)
def test_each_stage_of_a_run_is_called_in_one_place(call):
    pattern = re.compile(r"(?<![\w.])" + re.escape(call))
    callers = {module_name(path) for path in MODULES if pattern.search(path.read_text(encoding="utf-8"))}
    assert callers == STAGE_CALLS[call], "a second place that calls a stage is a second run"


def test_run_reads_downwards_in_sixty_lines():
    tree = ast.parse((PACKAGE / "training" / "run.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {"run"}
    assert functions["run"].end_lineno - functions["run"].lineno < 60


def test_own_keys_are_frozen():
    """A new own key is a deliberate change: here, in the README, and with a reason why upstream can't own it."""
    assert {name: set(keys) for name, keys in sections.OWN_KEYS.items()} == {
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
    for section, (_, definition) in sections.OWNERS.items():
        if definition:
            assert not set(fields.read_fields(definition)) & set(sections.OWN_KEYS[section]), section
    for section, words in sections.KEYWORDS.items():
        assert not set(words) & set(sections.OWN_KEYS[section]), section
    for builder in set(sections.BUILDERS.values()):
        builder_keys = set(fields.read_fields(keys.get_builder_config(builder)))
        builder_keys |= set(fields.read_arguments(sections.LOAD_DATASET[1])) - {"path"}
        assert not builder_keys & set(sections.OWN_KEYS["data.*"]), builder


def test_refused_keys_exist_in_their_owner():
    """A refusal of a key that upstream dropped is dead; the owner's absence of it says enough."""
    for section, refused in sections.REFUSED.items():
        if section == "data.*":
            theirs = fields.read_arguments(sections.LOAD_DATASET[1])
        elif section == keys.GENERATION:
            theirs = fields.read_popped_keywords(sections.GENERATION[1])
        elif sections.OWNERS[section][1]:
            theirs = fields.read_fields(sections.OWNERS[section][1])
        else:
            continue
        reserved = {"quant_method"}  # an attribute of every quantization's config, no argument of this one's
        assert set(refused) - reserved <= set(theirs), section


def test_no_module_names_what_upstream_owns():
    """`learning_rate` and its like pass through; no module of ours knows them."""
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        writes = path.stem == "recipe_writer" or path.parent.name == "importers"
        read = re.search(r'\.learning_rate\b|"train", "learning_rate"|\blearning_rate=', text)
        assert not read or writes, path.stem  # these write recipes


def test_nothing_tracked_carries_a_path_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if path.suffix in (".safetensors",) or not path.is_file() or path == Path(__file__):
            continue
        assert not re.search(r"/(work|root|home|Users)/\w", path.read_text(encoding="utf-8")), name
