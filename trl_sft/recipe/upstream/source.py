"""Finds a definition in the installed packages' sources without importing them.

In: `package.module` and a name. Out: its `ast` node, the module where it is defined, or the words that
it lists. Only the statement asked for is parsed: the files are long, and importing trl takes seconds.
Deliberately absent: what a dataclass or a function is (`owners`).
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from trl_sft.errors import Fault, MissingPackage

PACKAGES = ("accelerate", "datasets", "peft", "torch", "transformers", "trl")
_IMPORT = re.compile(r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n(]+)", re.MULTILINE)

_MARGIN = re.compile(r"^[^\s)\]}]", re.MULTILINE)


@functools.cache
def find_statement(module: str, name: str) -> ast.stmt | None:
    """Return the class, function or assignment at the top of a module; None where there is none."""
    written = read_text(module)
    pattern = rf"^(?:(?:class|def|async def)[ ]+{name}\b|{name}[ ]*(?::[^=\n]+)?=(?!=))"
    starts = [match.start() for match in re.finditer(pattern, written, re.MULTILINE)]
    return _statement(written, starts[-1]) if starts else None


def find_function(module: str, names: str) -> ast.FunctionDef | None:
    """Return the function that `function` or `Class.method` names."""
    name, _, inner = names.partition(".")
    node = find_statement(module, name)
    if isinstance(node, ast.ClassDef):
        node = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == inner), None)
    return node if isinstance(node, ast.FunctionDef) else None


@functools.cache
def find_defining_module(module: str, name: str) -> str:
    """Return the module that defines `name` as seen from `module`."""
    if not module or find_statement(module, name) is not None or not (source := read_imports(module).get(name)):
        return module
    if find_file(f"{source}.{name}"):  # a module imported by its name
        return f"{source}.{name}"
    return source if source == module or not find_file(source) else find_defining_module(source, name)


@functools.cache
def read_imports(module: str) -> Mapping[str, str]:
    """Return the names that `from ... import` brings into a module, each with the module it is brought from."""
    found: dict[str, str] = {}
    file = find_file(module)
    inside = file is not None and file.name == "__init__.py"
    for dots, source, listed in _IMPORT.findall(read_text(module)):
        above = module.split(".")
        above = above[: len(above) - len(dots) + inside] if dots else []
        for item in re.sub(r"#[^\n]*|[()\\]", "", listed).split(","):
            words = item.split()
            if words:
                found.setdefault(words[-1], ".".join([*above, source]).strip("."))
    return found


def read_words(expression: ast.AST | None, module: str, inside: ast.AST | None = None) -> tuple[str, ...]:
    """Return the texts that an expression lists: a list, a dict's keys, an enumeration, a sum of such; () if none.

    `inside`: the function in which it stands, for its own variables.
    """
    match expression:
        case ast.Constant(value=str(word)):
            return (word,)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return tuple(word for item in items for word in read_words(item, module, inside))
        case ast.Dict(keys=keys, values=values):
            pairs = zip(keys, values, strict=True)
            return tuple(word for key, value in pairs for word in read_words(key or value, module, inside))
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return read_words(left, module, inside) + read_words(right, module, inside)
        case ast.IfExp(body=body, orelse=orelse):
            return read_words(body, module, inside) + read_words(orelse, module, inside)
        case ast.Call(func=ast.Attribute(value=value, attr="keys" | "copy")):
            return read_words(value, module, inside)
        case ast.Call(func=ast.Name(id="dict" | "list" | "tuple" | "sorted" | "set"), args=args, keywords=named):
            listed = [word for value in args for word in read_words(value, module, inside)]
            for keyword in named:
                listed += [keyword.arg] if keyword.arg else read_words(keyword.value, module, inside)
            return tuple(listed)
        case ast.Call(func=function):
            return read_words(function, module, inside)
        case ast.Attribute(value=ast.Name(id=name), attr=attr):
            above = find_defining_module(module, name)  # a module's name, or a member of an enumeration
            return read_listed_words(above, attr) or read_listed_words(above, f"{name}.{attr}")
        case ast.Name(id=name):
            local = [n.value for n in _assigned(inside, name)]
            return (
                read_words(local[-1], module, inside)
                if local
                else read_listed_words(find_defining_module(module, name), name)
            )
    return ()


@functools.cache
def read_listed_words(module: str, name: str) -> tuple[str, ...]:
    """Return the texts that an enumeration, a constant, a `Class.attribute` or a function's last return lists."""
    head, _, inner = name.partition(".")
    module = find_defining_module(module, head)
    node = find_statement(module, head) if module else None
    match node:
        case ast.ClassDef(bases=bases, body=body) if inner or any("Enum" in ast.unparse(base) for base in bases):
            values = [n.value for n in body if isinstance(n, ast.Assign) and (not inner or _targets(n, inner))]
            return tuple(word for value in values for word in read_words(value, module))
        case ast.FunctionDef():
            returns = [n.value for n in ast.walk(node) if isinstance(n, ast.Return) and n.value]
            return read_words(returns[-1], module, node) if returns else ()
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return read_words(value, module)
    return ()


@functools.cache
def read_compared_words(module: str, names: str, variable: str) -> tuple[str, ...]:
    """Return the words that a function of the owner's looks for `variable` among, as in `if x not in ["a", "b"]`."""
    node = find_function(module, names)
    for item in ast.walk(node) if node else ():
        if isinstance(item, ast.Compare) and isinstance(item.ops[0], ast.In | ast.NotIn):
            listed = read_words(item.comparators[0], module, node)
            if listed and ast.unparse(item.left) == variable:
                return listed
    return ()


def read_declared_names(module: str, kind: str) -> tuple[str, ...]:
    """Return the names that a stub declares to be of a type, as in `float32: dtype = ...`."""
    return tuple(re.findall(rf"^(\w+): {kind} = ", read_text(module), re.MULTILINE))


def look_up_name(module: str, name: str, word: str) -> str:
    """Return the name to which a constant mapping leads `word`, an enumeration's member or text; "" if to none."""
    node = find_statement(module, name)
    table = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    pairs = zip(table.keys, table.values, strict=True) if isinstance(table, ast.Dict) else ()
    for key, value in pairs:
        keys, leads = key, value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict.fromkeys":
            keys, leads = value.args
        if word in read_words(keys, module) and isinstance(leads, ast.Name):
            return leads.id
    return ""


def _assigned(inside: ast.AST | None, name: str) -> Iterator[ast.Assign]:
    for node in ast.walk(inside) if inside else ():
        if isinstance(node, ast.Assign) and _targets(node, name):
            yield node
        elif isinstance(node, ast.AnnAssign) and node.value and ast.unparse(node.target) == name:
            yield ast.Assign([node.target], node.value)


def _targets(node: ast.Assign, name: str) -> bool:
    return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)


@functools.cache
def read_text(module: str) -> str:
    """Return the source of a module; empty where it is none of Python's that can be read. Raises MissingPackage."""
    file = find_file(module)
    return file.read_text(encoding="utf-8") if file else ""


def _statement(written: str, start: int) -> ast.stmt | None:
    """Return the statement that begins at `start`: it ends before a line at the margin, once it can be parsed."""
    for end in (*(match.start() for match in _MARGIN.finditer(written, start + 1)), len(written)):
        try:
            return ast.parse(written[start:end]).body[0]
        except SyntaxError:  # a line at the margin inside brackets or a text
            continue
    return None


@functools.cache
def find_file(module: str) -> Path | None:
    """Return the source file of a module; None where it is not one that can be read. Raises MissingPackage."""
    package, *rest = module.split(".")
    folder = _folder(package) if package else None
    if folder is None:
        return None
    whole = folder.joinpath(*rest)
    kinds = (whole.with_suffix(".py"), whole / "__init__.py", whole / "__init__.pyi")
    return next((file for file in kinds if file.is_file()), None)


@functools.cache
def _folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        if package in PACKAGES:
            raise missing_package(package)
        return None
    return Path(spec.submodule_search_locations[0])


def missing_package(package: str) -> MissingPackage:
    """Return the error that says that a package is to be installed."""
    return MissingPackage(Fault(package, "not installed", "pip install trl-sft, in this Python"))
