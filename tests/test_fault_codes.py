"""Every fault carries a code of the list, every code of the list is used, and no code disappears."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
import yaml

from trl_sft import errors

ROOT = Path(errors.__file__).parent
CODES = yaml.safe_load((ROOT / "fault_codes.yaml").read_text(encoding="utf-8"))
SNAPSHOT = Path(__file__).parent / "snapshots" / "fault_codes.txt"
AREAS = {
    "build",
    "export",
    "launch",
    "recipe",
    "data",
    "template",
    "model",
    "run",
    "chat",
    "evaluation",
    "machine",
    "hub",
    "import",
    "resume",
    "merge",
    "proof",
    "mirror",
    "package",
    "report",
    "votes",
    "judge",
    "path",
    "serve",
}
# what makes a fault, or what a fault is made of later
CONSTRUCTORS = {"Fault", "FormatError", "MaskError", "LocationProblem", "FolderDecision", "PathProblem"}
METHODS = {"fault", "make_error"}
SOURCES = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.rglob("*.py"))]


def find_constructions(path):
    """Return (line, expression of the code) of each construction of a fault in a module; None = it has no code."""
    constructions = []
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        is_constructor = isinstance(node.func, ast.Name | ast.Attribute) and name_of(node.func) in CONSTRUCTORS
        if is_constructor or (isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
            code = next((keyword.value for keyword in node.keywords if keyword.arg == "code"), None)
            constructions.append((node, code))
    return constructions


def name_of(function):
    return function.id if isinstance(function, ast.Name) else function.attr


def list_literals(path):
    """Return every literal that a module passes as `code=` or assigns to `code`."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    values = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "code"]
    values += [node.value for node in ast.walk(tree) if isinstance(node, ast.Assign) and assigns_code(node)]
    constants = [node.value for value in values for node in ast.walk(value) if isinstance(node, ast.Constant)]
    return {constant for constant in constants if isinstance(constant, str) and "." in constant}


def assigns_code(node):
    return any(isinstance(target, ast.Name) and target.id == "code" for target in node.targets)


def says_nothing_wrong(node):
    """Tell whether a FolderDecision has no problem, so that it becomes no fault."""
    problem = [keyword for keyword in node.keywords if keyword.arg in ("problem", "fix")]
    return name_of(node.func) == "FolderDecision" and not node.args and not problem


@pytest.mark.parametrize("path", SOURCES)
def test_every_fault_has_a_code_of_the_list(path):
    for node, code in find_constructions(path):
        if says_nothing_wrong(node):
            continue
        place = f"trl_sft/{path}:{node.lineno}"
        assert code is not None, f"{place}: pass code=, one of fault_codes.yaml"
        if not isinstance(code, ast.Constant):  # a code that a called function chose is passed on
            assert isinstance(code, ast.Name | ast.Attribute | ast.IfExp), f"{place}: {ast.unparse(code)}"
    assert list_literals(path) <= set(CODES), f"trl_sft/{path}: codes that fault_codes.yaml lacks"


def test_every_code_of_the_list_is_used():
    used = set().union(*map(list_literals, SOURCES))
    assert set(CODES) - used == set()


def test_a_code_is_never_removed_and_new_codes_are_recorded(request):
    if request.config.getoption("--update"):
        SNAPSHOT.write_text("".join(f"{code}\n" for code in sorted(CODES)), encoding="utf-8")
    recorded = SNAPSHOT.read_text(encoding="utf-8").split()
    assert sorted(CODES) == recorded, "run pytest --update tests/test_fault_codes.py; a released code stays"


@pytest.mark.parametrize("code", CODES)
def test_every_code_has_an_area_a_meaning_a_cause_and_a_fix(code):
    entry = CODES[code]
    assert re.fullmatch(r"[a-z]+\.[a-z][a-z0-9_]+", code)
    assert code.partition(".")[0] in AREAS
    assert set(entry) - {"exit_code"} == {"meaning", "cause", "fix"}
    assert all(entry[name].endswith(".") for name in ("meaning", "cause", "fix"))


def test_page_of_errors_has_the_codes(request):
    """The tables of docs/reference/errors.md are generated; `pytest --update tests/test_fault_codes.py` writes them."""
    pattern = re.compile(r"(?<=<!-- generated: fault_codes -->\n).*?(?=<!-- end -->)", re.DOTALL)
    spec = importlib.util.spec_from_file_location("build_reference", ROOT.parent / "scripts" / "build_reference.py")
    builder = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(builder)
    tables = f"{builder.build_fault_codes()}\n"
    page = ROOT.parent / "docs" / "reference" / "errors.md"
    text = page.read_text(encoding="utf-8")
    if request.config.getoption("--update"):
        text = pattern.sub(lambda _: tables, text)
        page.write_text(text, encoding="utf-8")
    assert pattern.search(text)[0] == tables, "run pytest --update tests/test_fault_codes.py"


def test_codes_of_an_area_stand_in_order():
    assert list(CODES) == sorted(CODES)
