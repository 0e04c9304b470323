"""Reads which keys an upstream class, function or parser takes, from its source text.

Inputs: an owner, `package.module:Class`, `package.module:function` or `package.module:Class.method`. Outputs:
its fields or arguments with type, default and help. Not here: any list of upstream's names, which owner a
section of a recipe has (`keys`), and whether a value is of a type (`types`).
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Iterator
from typing import NamedTuple

from trl_sft.recipe.upstream import source


class WordList(NamedTuple):
    """Where an owner lists the words that a key takes, if the key's type does not list them."""

    sources: tuple[str, ...]  # `module:name`: an enumeration, a constant, or a function that returns the words
    compared_variable: str = ""  # read the words with which the function compares this variable
    documented_key: str = ""  # read the words in double quotes in the owner's help of this key
    is_stub_type: bool = False  # read the names that a stub declares to be of the type `name`
    extra_words: tuple[str, ...] = ()  # further words that upstream takes
    pattern: str = ""  # a regular expression of further texts that upstream takes
    pattern_description: str = ""  # the pattern, as a message writes it
    ignores_case: bool = False  # upstream lists the words in capitals and takes them in any case
    accepts_several: bool = False  # a text may hold several of the words, separated by spaces


class Field(NamedTuple):
    """One key of an owner."""

    name: str
    type: ast.expr | None  # None: the owner declares none
    default: str  # as the source writes it; "" = the owner declares no default
    module: str = ""  # where the names in `type` and `choices` are looked up
    choices: ast.expr | WordList | None = None  # what the owner lists beside the type
    help: str = ""  # what the owner says in the declaration; `read_help` reads the docstrings too


_PLAIN_TYPES = ("int", "float", "bool", "str", "dict", "list")
# The names of which a documented type may consist. Any other name is a class, which YAML cannot write.
_WRITABLE_NAMES = {*_PLAIN_TYPES, "None", "Any", "Union", "Optional", "Literal", "tuple"}

# The YAML types for argparse's `type=`: an option of type text may be a number in YAML (`rdzv_id: 1`).
_OPTION_TYPES = {"str": "str | int", "comma_separated_list": "list[str]"}


@functools.cache
def read_fields(owner: str) -> dict[str, Field]:
    """Return the keys of an owner.

    Args:
        owner: a dataclass (its fields, those of its bases first), a function that makes an argparse parser (the
            parser's options), or another function or method (its arguments).

    Returns:
        Name -> field. A base class written as an attribute is left out: `datasets.BuilderConfig` declares what the
        author of a builder sets (version, description), not keywords of a user.

    Raises:
        UpstreamChanged: the owner is not there.

    """
    module, _, name = owner.partition(":")
    node = None if "." in name else source.find_statement(module, name)
    if isinstance(node, ast.FunctionDef):
        return _read_options(node, module) or read_arguments(owner)
    if not isinstance(node, ast.ClassDef):
        return read_arguments(owner)
    declared: dict[str, Field] = {}
    for base in _find_bases(owner):
        declared |= read_fields(base)
    for item in node.body:
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            declared[item.target.id] = _read_field(item, item.target.id, owner)
    return declared


@functools.cache
def read_arguments(owner: str) -> dict[str, Field]:
    """Return the named arguments of a function or method without `self`. Raises UpstreamChanged.

    An argument without an annotation has the type of its default, else the documented one.
    """
    module, _, path = owner.partition(":")
    arguments = source.get_function(module, path).args
    positional = arguments.posonlyargs + arguments.args
    without_default = len(positional) - len(arguments.defaults)
    defaults = [*[None] * without_default, *arguments.defaults, *arguments.kw_defaults]
    declared = {}
    for argument, default in zip(positional + arguments.kwonlyargs, defaults, strict=True):
        if argument.arg != "self":
            kind = argument.annotation or _infer_type(owner, argument.arg, default)
            declared[argument.arg] = Field(argument.arg, kind, _unparse_default(default, module), module)
    return declared


@functools.cache
def read_popped_keywords(owner: str) -> dict[str, Field]:
    """Return the keywords that a function or method takes by `kwargs.pop("name", default)`. Raises UpstreamChanged."""
    module, _, path = owner.partition(":")
    popped: dict[str, Field] = {}
    for call in ast.walk(source.get_function(module, path)):
        if not isinstance(call, ast.Call) or ast.unparse(call.func) != "kwargs.pop":
            continue
        words = source.read_words(call.args[0], module)
        default = call.args[1] if len(call.args) > 1 else None
        if words and not words[0].startswith("_"):
            kind = _infer_type(owner, words[0], default)
            popped[words[0]] = Field(words[0], kind, _unparse_default(default, module), module)
    return popped


def read_help(owner: str, name: str) -> str:
    """Return the help text of a key.

    Args:
        owner: a class, function or method, or a constant that holds a docstring.
        name: the key.

    Returns:
        The help in the declaration, else the entry in the docstring of the class that has the key; "" if neither
        says anything. Paragraphs stay apart by an empty line.

    """
    if not _is_docstring(owner):
        field = read_fields(owner).get(name)
        if field is not None and field.help:
            return field.help
    return _read_documented_help(owner, name)


def read_quoted_words(owner: str, name: str) -> tuple[str, ...]:
    """Return the words that the docstring of an owner, or of its bases, puts in double quotes for a key."""
    return tuple(dict.fromkeys(re.findall(r'"(\w+)"', _read_documented_help(owner, name))))


def is_dataclass(owner: str) -> bool:
    """Tell whether `package.module:Class` is a class with annotated fields."""
    node = source.find_statement(*owner.split(":"))
    return isinstance(node, ast.ClassDef) and any(isinstance(item, ast.AnnAssign) for item in node.body)


def _read_options(function: ast.FunctionDef, module: str) -> dict[str, Field]:
    """Return the options of `parser.add_argument("--one-name", type=...)`, each under `one_name`.

    An option without a type is a switch.
    """
    options: dict[str, Field] = {}
    for call in ast.walk(function):
        if not isinstance(call, ast.Call) or not ast.unparse(call.func).endswith(".add_argument"):
            continue
        flags = [argument.value for argument in call.args if isinstance(argument, ast.Constant)]
        long_flags = [flag for flag in flags if isinstance(flag, str) and flag.startswith("--")]
        if not long_flags:
            continue  # a positional argument: the script that is launched
        name = long_flags[0].removeprefix("--").replace("-", "_")
        keywords = {keyword.arg: keyword.value for keyword in call.keywords}
        declared_type = ast.unparse(keywords["type"]) if "type" in keywords else "bool"
        if "choices" not in keywords:
            declared_type = _OPTION_TYPES.get(declared_type, declared_type)
        options[name] = Field(
            name,
            ast.parse(declared_type, mode="eval").body,
            _unparse_default(keywords.get("default"), module),
            module,
            keywords.get("choices"),
            " ".join(source.read_words(keywords.get("help"), module)),
        )
    return options


def _find_bases(owner: str) -> list[str]:
    """Return the base classes of a class that are written as a name, each as `module:Class`."""
    module, _, name = owner.partition(":")
    node = None if "." in name else source.find_statement(module, name)
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    resolved = [source.resolve(module, base.id) for base in bases if isinstance(base, ast.Name)]
    return [f"{origin}:{base}" for origin, base in resolved if source.find_statement(origin, base)]


def _read_field(item: ast.AnnAssign, name: str, owner: str) -> Field:
    """Read a line of a dataclass, `name: type = field(default=..., metadata={...})`."""
    module, _, class_name = owner.partition(":")
    default = item.value
    metadata: dict[str, ast.expr] = {}
    if isinstance(default, ast.Call):
        keywords = {keyword.arg: keyword.value for keyword in default.keywords}
        default = keywords.get("default") or keywords.get("default_factory") or default
        mapping = keywords.get("metadata")
        if isinstance(mapping, ast.Dict):
            pairs = zip(mapping.keys, mapping.values, strict=True)
            metadata = {ast.unparse(key).strip("'\""): value for key, value in pairs if key}
    text = metadata.get("help")
    help_text = text.value if isinstance(text, ast.Constant) and isinstance(text.value, str) else ""
    choices = metadata.get("choices")
    help_text = help_text.replace("%%", "%")  # as argparse needs it
    return Field(name, item.annotation, _unparse_default(default, module, class_name), module, choices, help_text)


def _unparse_default(default: ast.expr | None, module: str, class_name: str = "") -> str:
    """Return a default as the source writes it; "" = no default. The name of a constant text becomes that text.

    If the name is assigned several times, the last one counts: transformers assigns `default_optim` again for torch
    2.8.
    """
    if isinstance(default, ast.Name):
        path = f"{class_name}.{default.id}" if class_name else default.id
        if texts := source.read_listed_words(module, path):
            return repr(texts[-1])
    return ast.unparse(default) if default else ""


def _infer_type(owner: str, name: str, default: ast.expr | None) -> ast.expr | None:
    """Return the type that a plain default shows, else the documented one; None if neither says."""
    if isinstance(default, ast.Constant) and type(default.value).__name__ in _PLAIN_TYPES:
        return ast.Name(type(default.value).__name__)
    documented = _parse_documented_type(_read_entry(owner, name)[0])
    if documented is not None and isinstance(default, ast.Constant) and default.value is None:
        return ast.BinOp(documented, ast.BitOr(), ast.Constant(None))
    return documented


def _parse_documented_type(text: str) -> ast.expr | None:
    """Return a type as docstrings write it, "`int` or `list[int]`, *optional*"; None if YAML cannot write it."""
    plain = re.sub(r"[`*]|,? *(optional|default).*", "", text.replace("(", "[").replace(")", "]"))
    while plain.count("]") > plain.count("["):  # the bracket that closes the docstring's own
        plain = plain.rstrip()[:-1]
    union: ast.expr | None = None
    for part in re.split(r"\s+or\s+", plain.strip(" ,")):
        try:
            node = ast.parse(part.strip(), mode="eval").body
        except SyntaxError:
            return None
        names = {word.id for word in ast.walk(node) if isinstance(word, ast.Name)}
        has_tuple_keys = "dict[tuple" in part  # a key of a YAML mapping is no list
        if names <= _WRITABLE_NAMES and not has_tuple_keys and not isinstance(node, ast.Tuple):
            union = ast.BinOp(union, ast.BitOr(), node) if union else node
    return union


def _read_documented_help(owner: str, name: str) -> str:
    """Return the text of a key in the docstring of an owner, else in that of a base; "" if none has it."""
    text = _read_entry(owner, name)[1]
    if text:
        return text
    return next((inherited for base in _find_bases(owner) if (inherited := read_help(base, name))), "")


@functools.cache
def _read_entry(owner: str, name: str) -> tuple[str, str]:
    """Return the type and the text of a key in the docstrings of an owner; ("", "") where none has it.

    An entry is a line `name (type): text` or `name (type):`, and all lines below it that are indented further.
    """
    heading = re.compile(rf"^(?P<indent> *)(?:- )?{name} *:? *(?:\((?P<type>.*?)\)+)? *:(?: +(?P<text>.*))?$")
    for docstring in _read_docstrings(owner):
        lines = docstring.splitlines()
        for number, line in enumerate(lines):
            if match := heading.match(line):
                block = _read_indented_block(lines[number + 1 :], len(match["indent"]))
                text = "\n".join([*([match["text"]] if match["text"] else []), block])
                return match["type"] or "", "\n".join(line.rstrip() for line in text.strip().splitlines())
    return "", ""


def _read_indented_block(lines: list[str], indent: int) -> str:
    """Return the first lines that are empty or indented by more than `indent`, without their common indent."""
    block = []
    for line in lines:
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            break
        block.append(line)
    return inspect.cleandoc("\n".join(block))


def _read_docstrings(owner: str) -> Iterator[str]:
    """Yield the docstring of a function or method and that of its class, or a constant's text."""
    module, _, path = owner.partition(":")
    for node in (source.find_function(module, path), source.find_statement(module, path.partition(".")[0])):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            yield inspect.cleandoc(str(node.value.value))  # shared by several classes


def _is_docstring(owner: str) -> bool:
    """Tell whether an owner is a constant that holds a docstring."""
    module, _, path = owner.partition(":")
    return isinstance(source.find_statement(module, path.partition(".")[0]), ast.Assign)
