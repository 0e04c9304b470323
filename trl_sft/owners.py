"""Asks the installed packages which keys they take, without importing them.

In: `package.module:Class` or `package.module:function`. Out: their fields or arguments with type,
default and choices, read from the source with `ast` (importing trl takes seconds; this takes
hundredths). Deliberately absent: any list of upstream's names.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from trl_sft.errors import Fault, MissingPackage

# Where a class lives that its subclass imports from a package's top, which re-exports it lazily.
_HOMES = {("transformers", "TrainingArguments"): "transformers.training_args"}
_SCALARS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,)}
_LISTS = ("list", "List", "Sequence", "tuple", "Tuple", "set")


class Field(NamedTuple):
    """One key of an owner."""

    name: str
    type: ast.expr | None  # None: the owner declares none
    default: str  # as the source writes it
    choices: tuple[str, ...]  # empty: any value of the type
    module: str  # where names in `type` are looked up


@functools.cache
def fields(owner: str) -> dict[str, Field]:
    """Return the dataclass fields of `package.module:Class`, those of its bases first; `arguments` of a method.

    Of a function they are the options that it gives an `argparse.ArgumentParser`.

    A base written as an attribute is not followed: `datasets.BuilderConfig` holds what a builder's author
    declares (version, description), no keyword of a user's.
    """
    module, name = owner.split(":")
    if "." in name:
        return arguments(owner)
    node = _definitions(module).get(name)
    if isinstance(node, ast.FunctionDef):
        return _options(node, module)
    if not isinstance(node, ast.ClassDef):
        return {}
    found: dict[str, Field] = {}
    for base in node.bases:
        if isinstance(base, ast.Name):
            found |= fields(f"{_home(module, base.id)}:{base.id}")
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = _field(item, item.target.id, module)
    return found


@functools.cache
def arguments(owner: str) -> dict[str, Field]:
    """Return the named arguments of `package.module:function` or `package.module:Class.method`, less self.

    An argument without an annotation has the type of its default.
    """
    module, _, names = owner.partition(":")
    name, _, method = names.partition(".")
    node = _definitions(module).get(name)
    if isinstance(node, ast.ClassDef):
        node = next((item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == method), None)
    assert isinstance(node, ast.FunctionDef), owner
    plain = node.args.posonlyargs + node.args.args
    defaults = [None] * (len(plain) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = list(zip(plain + node.args.kwonlyargs, defaults + list(node.args.kw_defaults), strict=True))
    return {
        arg.arg: Field(arg.arg, arg.annotation or _type(value), ast.unparse(value) if value else "", (), module)
        for arg, value in pairs
        if arg.arg != "self"
    }


def _type(default: ast.expr | None) -> ast.expr | None:
    """Return the type that a plain default shows; None where it shows none."""
    known = isinstance(default, ast.Constant) and type(default.value).__name__ in _SCALARS
    return ast.Name(type(default.value).__name__) if known else None  # type: ignore[union-attr]


@functools.cache
def popped(owner: str) -> dict[str, Field]:
    """Return the keywords that `package.module:Class.method` takes by `kwargs.pop("name", default)`."""
    module, _, names = owner.partition(":")
    name, _, method = names.partition(".")
    found: dict[str, Field] = {}
    for node in ast.walk(_definitions(module)[name]):
        if not isinstance(node, ast.FunctionDef) or node.name != method:
            continue
        for call in ast.walk(node):
            if (
                isinstance(call, ast.Call)
                and ast.unparse(call.func) == "kwargs.pop"
                and isinstance(call.args[0], ast.Constant)
            ):
                word, default = str(call.args[0].value), call.args[1] if len(call.args) > 1 else None
                found[word] = Field(word, _type(default), ast.unparse(default) if default else "", (), module)
    return {word: field for word, field in found.items() if not word.startswith("_")}


def _options(function: ast.FunctionDef, module: str) -> dict[str, Field]:
    """Return what `parser.add_argument("--one-name", "--one_name", type=...)` declares, under one_name.

    An option without a type is a switch; text may be written as a number, which a command line makes text of.
    """
    found: dict[str, Field] = {}
    for call in ast.walk(function):
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(".add_argument"):
            continue
        texts = [arg.value for arg in call.args if isinstance(arg, ast.Constant)]
        long = [text for text in texts if isinstance(text, str) and text.startswith("--")]
        if not long:
            continue  # a word without dashes: the script that is launched
        name = long[0].removeprefix("--").replace("-", "_")
        words = {word.arg: word.value for word in call.keywords}
        written = ast.unparse(words["type"]) if "type" in words else "bool"
        kind = {"str": "str | int", "comma_separated_list": "list[str]"}.get(written, written)
        default = ast.unparse(words["default"]) if "default" in words else ""
        listed = words.get("choices")
        choices = [c.value for c in listed.elts if isinstance(c, ast.Constant)] if isinstance(listed, ast.List) else []
        found[name] = typed(name, kind)._replace(default=default, choices=tuple(map(str, choices)), module=module)
    return found


def version(package: str) -> str:
    """Return the installed version of a package. Raises MissingPackage."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise _missing(package) from None


def accepts(field: Field, value: object) -> bool:
    """Tell whether a plain value is of the type, and among the choices, that the owner declares."""
    if field.choices and isinstance(value, str):
        return value in field.choices
    return field.type is None or _fits(field.type, value, field.module)


def expected(field: Field) -> str:
    """Return in words what a key takes: its choices where it has some, else its type."""
    choices = field.choices or _choices(field.type, field.module)
    if choices:
        return "one of " + ", ".join(choices)
    if isinstance(field.type, ast.BinOp) and (some := _choices(field.type.left, field.module)):
        return f"one of {', '.join(some)}, or {_words(field.type.right)}"
    return _words(field.type) if field.type else "any value"


def typed(name: str, annotation: str) -> Field:
    """Return a field of ours, or of an owner that declares none, from a type written as text."""
    return Field(name, ast.parse(annotation, mode="eval").body, "", (), "")


def _fits(node: ast.expr, value: object, module: str) -> bool:
    if isinstance(node, ast.BinOp):
        return _fits(node.left, value, module) or _fits(node.right, value, module)
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):  # a forward reference
            return _fits(ast.parse(node.value, mode="eval").body, value, module)
        return node.value is None and value is None
    if isinstance(node, ast.Subscript):
        return _fits_subscript(node, value, module)
    name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
    if name in _SCALARS:
        return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
    return name == "Any" or (name in _LISTS and isinstance(value, list)) or value in _values(module, name)


def _fits_subscript(node: ast.Subscript, value: object, module: str) -> bool:
    name = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
    inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
    if name == "Literal":
        return any(isinstance(i, ast.Constant) and _is_literal(i.value, value) for i in inner)
    if name == "Optional" and value is None:
        return True
    if name in ("Optional", "Union"):
        return any(_fits(i, value, module) for i in inner)
    if name in ("dict", "Dict", "Mapping"):
        return isinstance(value, dict) and all(_fits(inner[-1], v, module) for v in value.values())
    if name in _LISTS and isinstance(value, list):
        if name in ("tuple", "Tuple") and not any(isinstance(i, ast.Constant) for i in inner):
            return len(value) == len(inner) and all(_fits(i, v, module) for i, v in zip(inner, value, strict=True))
        return all(_fits(inner[0], v, module) for v in value)
    return False


def _words(node: ast.expr) -> str:
    """Return a type in words where it is simple, else as its owner writes it."""
    parts = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text", "None": "null"}
    parts |= {"dict[str, str]": "a mapping of names to text", "dict[str, Any]": "a mapping"}
    written = ast.unparse(node).replace("typing.", "")
    optional = re.sub(r"^Optional\[(.*)\]$", r"\1 | None", written)
    words = [parts.get(part) for part in re.split(r" \| ", re.sub(r"^Union\[(.*)\]$", r"\1", optional))]
    return ", or ".join(sorted(filter(None, words), key="null".__eq__)) if all(words) else written


def _is_literal(declared: object, value: object) -> bool:
    # peft writes a family of words as one: 'pissa_niter_[number of iters]'
    if isinstance(declared, str) and isinstance(value, str) and "[" in declared:
        return value.startswith(declared.partition("[")[0])
    return declared == value and type(declared) is type(value)


def _choices(node: ast.expr | None, module: str) -> tuple[str, ...]:
    """Return the words that a type lists: a Literal, or `SomeEnum | str`, which upstream turns into the enum."""
    if isinstance(node, ast.BinOp):
        sides = [_choices(side, module) for side in (node.left, node.right)]
        rest = [ast.unparse(s) for s, c in zip((node.left, node.right), sides, strict=True) if not c]
        return sides[0] + sides[1] if all(r in ("str", "None") for r in rest) else ()
    if isinstance(node, ast.Subscript) and ast.unparse(node.value).endswith("Literal"):
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        return tuple(str(i.value) for i in inner if isinstance(i, ast.Constant))
    return _values(module, node.id) if isinstance(node, ast.Name) and node.id not in _SCALARS else ()


@functools.cache
def _values(module: str, name: str) -> tuple[str, ...]:
    """Return the texts of the enumeration `name` as `module` sees it; empty where it is none."""
    if not module:
        return ()
    node = _definitions(_home(module, name)).get(name)
    if not isinstance(node, ast.ClassDef) or not any("Enum" in ast.unparse(base) for base in node.bases):
        return ()
    constants = [item.value for item in node.body if isinstance(item, ast.Assign)]
    return tuple(c.value for c in constants if isinstance(c, ast.Constant) and isinstance(c.value, str))


def _field(item: ast.AnnAssign, name: str, module: str) -> Field:
    """Read `name: type = field(default=..., metadata={...})`, the form that the owners write."""
    default, about = item.value, {}
    if isinstance(default, ast.Call):
        words = {word.arg: word.value for word in default.keywords}
        default = words.get("default") or words.get("default_factory") or default
        metadata = words.get("metadata")
        if isinstance(metadata, ast.Dict):
            about = {ast.unparse(k).strip("'\""): v for k, v in zip(metadata.keys, metadata.values, strict=True) if k}
    choices = about.get("choices")
    words_listed = choices.elts if isinstance(choices, ast.List) else ()
    listed = tuple(str(c.value) for c in words_listed if isinstance(c, ast.Constant)) or _choices(
        item.annotation, module
    )
    return Field(name, item.annotation, ast.unparse(default) if default else "", listed, module)


@functools.cache
def _definitions(module: str) -> dict[str, ast.stmt]:
    """Return the top-level classes, functions and imports of a module by name, without importing it."""
    path = _path(module)
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text(encoding="utf-8")).body if path else ():
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.asname or alias.name: node for alias in node.names}
    return found


def _home(module: str, name: str) -> str:
    """Return the module that defines `name` as seen from `module`."""
    node = _definitions(module).get(name)
    if not isinstance(node, ast.ImportFrom):
        return module
    above = module if _path(module) and _path(module).name == "__init__.py" else module.rpartition(".")[0]  # type: ignore[union-attr]
    for _ in range(node.level - 1):
        above = above.rpartition(".")[0]
    source = f"{above}.{node.module}".rstrip(".") if node.level else node.module or ""
    source = _HOMES.get((source, name), source)
    return source if source == module or not _path(source) else _home(source, name)


def _path(module: str) -> Path | None:
    """Return the source file of a module; None where it is not Python's or ours to read. Raises MissingPackage."""
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package) if package else None
    if spec is None or not spec.submodule_search_locations:
        if package in {home.split(".")[0] for home in _HOMES.values()} | {"trl", "peft", "datasets", "torch"}:
            raise _missing(package)
        return None
    folder = Path(spec.submodule_search_locations[0], *rest)
    return next((p for p in (folder.with_suffix(".py"), folder / "__init__.py") if p.is_file()), None)


def _missing(package: str) -> MissingPackage:
    return MissingPackage(Fault(package, "not installed", "pip install trl-sft, in this Python"))
