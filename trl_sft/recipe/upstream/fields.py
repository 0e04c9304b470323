"""Asks the installed packages which keys they take, without importing them.

In: `package.module:Class`, `package.module:function` or `package.module:Class.method`. Out: fields or
arguments with type, default and the owner's help, read from the source. Deliberately absent: any list
of upstream's names, and whether a value is of a type (`values`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from importlib import metadata
from typing import NamedTuple

from trl_sft.recipe.upstream import source


class WordList(NamedTuple):
    """Where an owner says which words a key takes, where its type does not."""

    sources: tuple[str, ...]  # `module:name`; of a function, what it returns or compares with
    compared: str = ""  # the variable that the function compares with the words
    quoted: str = ""  # the key in whose help they stand in quotes
    declared: bool = False  # they are what the module declares to be of the type `name`
    also: tuple[str, ...] = ()  # what is taken beside
    other: str = ""  # a pattern of what is taken beside, and
    as_written: str = ""  # how a message writes it
    lower: bool = False  # listed in capitals, written in small letters
    several: bool = False  # a text may hold several, apart by spaces


_PLAIN = ("int", "float", "bool", "str", "dict", "list")
# what a documented type may consist of; any other word there is a class, which no YAML can write
_WRITABLE = {*_PLAIN, "None", "Any", "Union", "Optional", "Literal", "tuple"}


class Field(NamedTuple):
    """One key of an owner."""

    name: str
    type: ast.expr | None  # None: the owner declares none
    default: str  # as the source writes it; "" = it has to be given
    module: str = ""  # where names in `type` and `choices` are looked up
    choices: ast.expr | WordList | None = None  # what the owner lists beside the type
    help: str = ""  # what the owner says of it beside the field; `described` has the rest


@functools.cache
def read_fields(owner: str) -> dict[str, Field]:
    """Return the dataclass fields of `package.module:Class`, those of its bases first; `arguments` of a method.

    Of a function that makes an argparse parser, the parser's options.

    A base written as an attribute is not followed: `datasets.BuilderConfig` holds what a builder's author
    declares (version, description), no keyword of a user's.
    """
    module, name = owner.split(":")
    node = None if "." in name else source.find_statement(module, name)
    if not isinstance(node, ast.ClassDef):
        return (_options(node, module) if isinstance(node, ast.FunctionDef) else {}) or read_arguments(owner)
    found: dict[str, Field] = {}
    for base in _bases(owner):
        found |= read_fields(base)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found[item.target.id] = _field(item, item.target.id, module)
    return found


@functools.cache
def read_arguments(owner: str) -> dict[str, Field]:
    """Return the named arguments of `package.module:function` or `package.module:Class.method`, less self.

    An argument without an annotation has the type of its default, else the documented one.
    """
    module, _, names = owner.partition(":")
    node = source.find_function(module, names)
    if node is None:
        return {}
    plain = node.args.posonlyargs + node.args.args
    defaults = [None] * (len(plain) - len(node.args.defaults)) + list(node.args.defaults)
    pairs = list(zip(plain + node.args.kwonlyargs, defaults + list(node.args.kw_defaults), strict=True))
    return {
        arg.arg: Field(arg.arg, arg.annotation or _type(owner, arg.arg, value), _written(value), module)
        for arg, value in pairs
        if arg.arg != "self"
    }


@functools.cache
def read_popped_keywords(owner: str) -> dict[str, Field]:
    """Return the keywords that a function or method takes by `kwargs.pop("name", default)`."""
    module, _, names = owner.partition(":")
    node = source.find_function(module, names)
    found: dict[str, Field] = {}
    for call in ast.walk(node) if node else ():
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "kwargs.pop":
            word, default = source.read_words(call.args[0], module), call.args[1] if len(call.args) > 1 else None
            if word and not word[0].startswith("_"):
                found[word[0]] = Field(word[0], _type(owner, word[0], default), _written(default), module)
    return found


def read_help(owner: str, name: str) -> str:
    """Return the owner's help of a key: beside the field, else in the docstring of the class that has it; "" if none.

    Paragraphs stay apart by an empty line.
    """
    field = read_fields(owner).get(name)
    if field is not None and field.help:
        return field.help
    entry = _entry(owner, name)[1]
    return entry or next((text for base in _bases(owner) if (text := read_help(base, name))), "")


def read_quoted_words(owner: str, name: str) -> tuple[str, ...]:
    """Return the words that the owner's help of a key puts in double quotes."""
    entry = next((text for o in [owner, *_bases(owner)] if (text := _entry(o, name)[1])), "")
    return tuple(dict.fromkeys(re.findall(r'"(\w+)"', entry)))


def is_dataclass(owner: str) -> bool:
    """Tell whether `package.module:Class` is a class with fields."""
    node = source.find_statement(*owner.split(":"))
    return isinstance(node, ast.ClassDef) and any(isinstance(item, ast.AnnAssign) for item in node.body)


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
        said = " ".join(source.read_words(words.get("help"), module))
        choices, default = words.get("choices"), _written(words.get("default"))
        found[name] = Field(name, ast.parse(kind, mode="eval").body, default, module, choices, said)
    return found


def get_version(package: str) -> str:
    """Return the installed version of a package. Raises MissingPackage."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        raise source.missing_package(package) from None


def _bases(owner: str) -> list[str]:
    module, name = owner.split(":")
    node = None if "." in name else source.find_statement(module, name)
    names = [base.id for base in node.bases if isinstance(base, ast.Name)] if isinstance(node, ast.ClassDef) else []
    found = [f"{source.find_defining_module(module, name)}:{name}" for name in names]
    return [base for base in found if source.find_statement(*base.split(":"))]


def _field(item: ast.AnnAssign, name: str, module: str) -> Field:
    """Read `name: type = field(default=..., metadata={...})`, the form that the owners write."""
    default, about = item.value, {}
    if isinstance(default, ast.Call):
        words = {word.arg: word.value for word in default.keywords}
        default = words.get("default") or words.get("default_factory") or default
        metadata = words.get("metadata")
        if isinstance(metadata, ast.Dict):
            about = {ast.unparse(k).strip("'\""): v for k, v in zip(metadata.keys, metadata.values, strict=True) if k}
    said = about.get("help")
    help_ = said.value.replace("%%", "%") if isinstance(said, ast.Constant) and isinstance(said.value, str) else ""
    return Field(name, item.annotation, _written(default), module, about.get("choices"), help_)


def _written(default: ast.expr | None) -> str:
    return ast.unparse(default) if default else ""


def _type(owner: str, name: str, default: ast.expr | None) -> ast.expr | None:
    """Return the type that a plain default shows, else the documented one; None where neither says."""
    if isinstance(default, ast.Constant) and type(default.value).__name__ in _PLAIN:
        return ast.Name(type(default.value).__name__)
    documented = _documented(_entry(owner, name)[0])
    if documented is not None and isinstance(default, ast.Constant) and default.value is None:
        return ast.BinOp(documented, ast.BitOr(), ast.Constant(None))
    return documented


def _documented(written: str) -> ast.expr | None:
    """Return a type as docstrings write it, `int` or `list[int]`, *optional*; None where YAML cannot write it."""
    plain = re.sub(r"[`*]|,? *(optional|default).*", "", written.replace("(", "[").replace(")", "]"))
    while plain.count("]") > plain.count("["):
        plain = plain.rstrip()[:-1]
    found: ast.expr | None = None
    for part in re.split(r"\s+or\s+", plain.strip(" ,")):
        try:
            node = ast.parse(part.strip(), mode="eval").body
        except SyntaxError:
            return None
        names = {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}
        of_tuples = "dict[tuple" in part  # a key of a YAML mapping is no list
        if names <= _WRITABLE and not of_tuples and not isinstance(node, ast.Tuple):
            found = ast.BinOp(found, ast.BitOr(), node) if found else node
    return found


@functools.cache
def _entry(owner: str, name: str) -> tuple[str, str]:
    """Return type and text of a key in the docstring of a class or function (`Args:` in Google's style)."""
    module, _, names = owner.partition(":")
    head = names.partition(".")[0]
    nodes = [source.find_function(module, names), source.find_statement(module, head)]
    for node in nodes:
        doc = ast.get_docstring(node) if isinstance(node, ast.ClassDef | ast.FunctionDef) else None
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):  # a docstring shared by classes
            doc = inspect.cleandoc(str(node.value.value))
        found = re.search(rf"^( *)(?:- )?{name} *:? *(?:\((.*?)\)+)? *:(?: +(.*))?$", doc or "", re.MULTILINE)
        if doc and found:
            rest = doc[found.end() :].splitlines()[1:]
            deep = [not line.strip() or len(line) - len(line.lstrip()) > len(found[1]) for line in rest]
            block = rest[: deep.index(False)] if False in deep else rest
            text = "\n".join([*([found[3]] if found[3] else []), inspect.cleandoc("\n".join(block))])
            return found[2] or "", "\n".join(line.rstrip() for line in text.strip().splitlines())
    return "", ""
