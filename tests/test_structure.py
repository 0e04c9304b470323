"""The package follows its rules of structure: layers, sizes, private names, frozen own keys."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

from trl_sft.data import formats
from trl_sft.evaluation.checks import check_requests
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import fields, keys

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "trl_sft"
MODULES = sorted(PACKAGE.rglob("*.py"))
MINIMUM_MODULES = 90  # fewer means that the search for modules is broken

# Packages import only from lower layers; siblings of one layer never import each other.
LAYERS = {
    **dict.fromkeys(["errors", "console", "fault_codes", "import_path", "json_output", "run_folder", "suggestions"], 1),
    "ranks": 1,
    **dict.fromkeys(
        ["checkpoints", "disk", "earlier_run", "redaction", "upstream_warnings", "file_digests", "row_progress"], 1
    ),
    **dict.fromkeys(["garbage_collection"], 1),
    "user_paths": 1,
    "recipe": 2,
    **dict.fromkeys(["data", "model", "importers", "mirroring", "launch"], 3),
    **dict.fromkeys(["tokenization", "evaluation", "publishing"], 4),
    **dict.fromkeys(["training", "reports", "serving", "building"], 5),
    "suspects": 6,
    "cli": 7,
    **dict.fromkeys(["__init__", "__main__"], 8),  # the public functions
}


def get_module_name(path):
    """Return the name of a module without `trl_sft`: `trl_sft/data/rows.py` -> `data.rows`."""
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


NAMES = {get_module_name(path) for path in MODULES}


def find_imports(path):
    """Yield every module of trl_sft that a file imports, also inside functions, with the imported names."""
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


def get_layer(module):
    """Return the layer of a module's package."""
    return LAYERS[module.partition(".")[0]]


def test_every_package_has_a_layer():
    assert len(MODULES) >= MINIMUM_MODULES
    assert {name.partition(".")[0] for name in NAMES} == set(LAYERS)


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_imports_go_to_lower_layers_only(path):
    name = get_module_name(path)
    package = name.partition(".")[0]
    violations = []
    for module, names in find_imports(path):
        imported_package = module.partition(".")[0]
        if names == ["__version__"]:  # an attribute of the package, not a module
            continue
        if imported_package == package or (get_layer(name) == get_layer(module) == 1):
            continue
        if package == "cli" and module == "__init__" and set(names) <= {"load_recipe", "train"}:
            continue  # the public functions
        if get_layer(module) >= get_layer(name):
            violations.append(module)
    assert violations == []


def test_imports_inside_a_package_have_no_cycle():
    graph = {get_module_name(file): {module for module, _ in find_imports(file)} & NAMES for file in MODULES}
    # A package's own __init__ stands for its entry; an import of a submodule names the submodule.
    visited, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module in visited:
            return
        path.append(module)
        for imported in sorted(graph[module]):
            if imported != "__init__" and module not in ("__init__", "__main__"):
                visit(imported)
        path.pop()
        visited.add(module)

    for module in sorted(graph):
        visit(module)


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_private_names_are_used_only_in_their_package(path):
    name = get_module_name(path)
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aliases = {}  # local name -> module of trl_sft
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


def test_class_names_are_unique_in_the_package():
    modules_by_class = {}
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ClassDef):
                modules_by_class.setdefault(node.name, []).append(get_module_name(path))
    assert {name: modules for name, modules in modules_by_class.items() if len(modules) > 1} == {}


def test_folders_of_tests_mirror_the_packages():
    folders = {path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("test_*.py")}
    packages = {path.parent.relative_to(PACKAGE) for path in MODULES if path.name == "__init__.py"}
    assert folders - {Path("docs")} <= packages, "a folder of tests has the name of a package"
    assert {Path(name) for name, layer in LAYERS.items() if 1 < layer < 7} <= folders


def test_formats_and_checks_of_the_recipe_equal_those_that_are_read():
    assert tuple(formats.FORMATS) == sections.FORMATS
    assert tuple(check_requests.CHECKS) == sections.CHECKS


# Functions that upstream calls with more than three arguments by position.
FIXED_SIGNATURES = {"forward", "attend", "on_log", "__torch_dispatch__"}


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_files_functions_and_parameter_lists_stay_within_their_limits(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno + 1 <= 60, node.name
            positional = [a.arg for a in (*node.args.posonlyargs, *node.args.args) if a.arg not in ("self", "cls")]
            assert len(positional) <= 3 or node.name in FIXED_SIGNATURES, f"{node.name}: name the others at the call"


@pytest.mark.parametrize("path", MODULES, ids=get_module_name)
def test_every_module_has_a_docstring(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


STAGE_CALLS = {  # call -> the only modules that make it: every command shares the stages
    "SFTConfig(": {"training.stages"},
    "load.find_model(": {"training.stages"},
    "tokenizer.load(": {"training.stages"},
    "build.tokenize(": {"training.stages"},
    # check reports columns where no tokenizer loads; the proof of an export reads prompts, and trains nothing
    "data_rows.load(": {"training.stages", "cli.check.report", "serving.proof.run_prompts"},
    "SFTTrainer(": {"training.stages", "training.dry_run"},
}


@pytest.mark.parametrize("call", STAGE_CALLS)
def test_each_stage_of_a_run_has_one_caller(call):
    pattern = re.compile(r"(?<![\w.])" + re.escape(call))
    callers = {get_module_name(path) for path in MODULES if pattern.search(path.read_text(encoding="utf-8"))}
    assert callers == STAGE_CALLS[call], "a second caller of a stage is a second implementation of a run"


def test_run_module_is_one_function_of_less_than_sixty_lines():
    tree = ast.parse((PACKAGE / "training" / "run.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert set(functions) == {"run"}
    assert functions["run"].end_lineno - functions["run"].lineno < 60


def test_own_keys_equal_the_frozen_list():
    """A new own key needs an entry here, a line in the reference and the reason why upstream cannot own it."""
    assert {name: set(keys) for name, keys in sections.OWN_KEYS.items()} == {
        "model": {"name_or_path", "config"},
        "tokenizer": {"chat_template", "chat_template_kwargs"},
        "quantization": set(),
        "lora": set(),
        "data": {
            *("train", "eval", "eval_fraction", "loss_on", "overlong", "special_tokens_in_text"),
            *("drop_leaked", "max_untrained", "on_bad_row"),
        },
        "data.*": {"path", "format", "wording", "rename", "task", "weight", "max_rows"},
        "train": set(),
        "evaluate": {"metrics", "max_rows", "generation", "prompts", "checks"},
        "launch": {"engine", "config"},
        "run": {
            *("resume", "overwrite", "allow", "max_hours", "logits_gib", "global_batch_size", "price_per_hour"),
            *("early_stopping", "mirror"),
        },
    }


def test_own_keys_and_upstream_keys_are_disjoint():
    for section, (_, definition) in sections.OWNERS.items():
        if definition:
            assert not set(fields.read_fields(definition)) & set(sections.OWN_KEYS[section]), section
    for section, keywords in sections.KEYWORDS.items():
        assert not set(keywords) & set(sections.OWN_KEYS[section]), section
    for builder in set(sections.BUILDERS.values()):
        builder_keys = set(fields.read_fields(keys.get_builder_config(builder)))
        builder_keys |= set(fields.read_arguments(sections.LOAD_DATASET[1])) - {"path"}
        assert not builder_keys & set(sections.OWN_KEYS["data.*"]), builder


def test_refused_keys_exist_upstream():
    """A refusal of a key that upstream removed has no use: an unknown key is refused in any case."""
    for section, refused in sections.REFUSED.items():
        if section == "data.*":
            upstream_keys = fields.read_arguments(sections.LOAD_DATASET[1])
        elif section == keys.GENERATION:
            upstream_keys = fields.read_popped_keywords(sections.GENERATION[1])
        elif sections.OWNERS[section][1]:
            upstream_keys = fields.read_fields(sections.OWNERS[section][1])
        else:
            continue
        reserved = {"quant_method"}  # an attribute of every quantization config, not an argument of BitsAndBytesConfig
        assert set(refused) - reserved <= set(upstream_keys), section


# What tells a process which one it is. `live` reads it too, since it compares what torch and the Trainer say.
RANK_WORDS = re.compile(
    r"\"(?:LOCAL_|GROUP_|NODE_)?RANK\"|\"WORLD_SIZE\"\)|process_index|is_last_process|get_rank\(|get_world_size\("
    r"|is_(?:local_|world_)?(?:process_zero|main_process)"
)


def test_only_ranks_asks_which_process_this_is():
    askers = {get_module_name(path) for path in MODULES if RANK_WORDS.search(path.read_text(encoding="utf-8"))}
    assert askers == {"ranks", "training.live", "launch.ray"}  # the last one tells the processes that it starts


def test_only_importers_use_the_key_learning_rate():
    """Keys of upstream pass through; `learning_rate` stands for all of them. A message may name it."""
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {
            node.attr if isinstance(node, ast.Attribute) else node.arg
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute | ast.keyword)
        }
        keys_in_code = {
            tuple(item.value for item in node.elts if isinstance(item, ast.Constant))
            for node in ast.walk(tree)
            if isinstance(node, ast.Tuple)
        }
        # importers write recipes, and synonyms say what others call a key
        is_importer = path.parent.name == "importers" or path.stem == "synonyms"
        uses_key = "learning_rate" in names or ("train", "learning_rate") in keys_in_code
        assert not uses_key or is_importer, path.stem


def test_tracked_files_contain_no_absolute_path_of_a_machine():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not files:
        pytest.skip("not a git checkout")
    for name in files:
        path = ROOT / name
        if path.suffix in (".safetensors",) or not path.is_file() or path == Path(__file__):
            continue
        assert not re.search(r"/(work|root|home|Users)/\w", path.read_text(encoding="utf-8")), name


def test_every_file_of_tests_has_a_name_of_its_own():
    """Two files of one name cannot be collected together, since the folders of tests are no packages."""
    names = [path.name for path in (ROOT / "tests").rglob("*.py")]
    assert len(names) > 130
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []
