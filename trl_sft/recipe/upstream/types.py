"""Whether a value from YAML is of the type that an owner declares, and what to write where it is not.

In: a `Field` and a plain value. Out: yes or no; words for a message. Types are read as their owner
writes them: unions, literals, enumerations, containers. A class that YAML cannot write takes no value.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection, Iterator

from trl_sft.recipe.upstream import fields
from trl_sft.recipe.upstream import source as upstream_source
from trl_sft.recipe.upstream.fields import Field, WordList
from trl_sft.suggestions import STRICT, nearest_name

_FEW = 3  # names that a short one may mean
_SCALARS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,)}
LIST_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "set")
MAPPING_TYPES = ("dict", "Dict", "Mapping")
# type -> in words, one and several
_IN_WORDS = {
    **{"int": ("a whole number", "whole numbers"), "float": ("a number", "numbers"), "str": ("text", "texts")},
    **{"bool": ("true or false", "true or false"), "None": ("null", "null"), "False": ("false", "false")},
    **{"Any": ("any value", "any values"), "list": ("a list", "lists"), "dict": ("a mapping", "mappings")},
}


def accepts(field: Field, value: object) -> bool:
    """Tell whether a plain value is of the type, and among the choices, that the owner declares."""
    listing = field.choices if isinstance(field.choices, WordList) else WordList(())
    if isinstance(value, str) and (listed := list_choices(field)):
        written = value.lower() if listing.lower else value
        words = written.split() if listing.several else [written]
        return all(any(_is_word(word, w) for word in listed) or bool(matches_pattern(listing, w)) for w in words)
    if isinstance(value, list) and listing.sources and not set(map(str, value)) <= set(list_choices(field)):
        return False
    return field.type is None or _fits(field.type, value, field.module)


def list_choices(field: Field) -> tuple[str, ...]:
    """Return the words that a text has to be one of; empty where any text will do, or none."""
    if isinstance(field.choices, WordList):
        return _listed(field.choices)
    return upstream_source.read_words(field.choices, field.module) or _choices(field.type, field.module)


def matches_pattern(listing: WordList, value: str) -> bool:
    """Tell whether a text that is none of the words is taken all the same: a kernel of the hub."""
    return bool(listing.other) and re.fullmatch(listing.other, value) is not None


def describe(field: Field) -> str:
    """Return in words what a key takes: its choices where it has some, else its type."""
    rest = [part for part in split_union(field.type) if not _lists_words(part, field.module)]
    listed = list_choices(field)
    if listed:
        rest = [part for part in rest if ast.unparse(part) not in ("str", "None")]
        more = [_union_in_words(rest)] if rest else []
        if isinstance(field.choices, WordList):
            listed = (*listed, *([field.choices.as_written] if field.choices.as_written else []))
            lists = [
                part for part in rest if isinstance(part, ast.Subscript) and get_type_name(part.value) in LIST_TYPES
            ]
            more = ["a list of them"] if lists else more
        return ", or ".join([f"one of {', '.join(listed)}", *more])
    return _union_in_words(split_union(field.type)) if field.type else "any value"


def suggest(word: str, known: Collection[str]) -> str:
    """Return the known word that one most likely means, "" = none shows: a slip, the end of a name, a short form."""
    if near := nearest_name(word, known, cutoff=STRICT):
        return near
    ends = [one for one in known if one.endswith(f"_{word}")]
    short = [one for one in known if re.fullmatch(".*".join(map(re.escape, word)), one)] if len(word) > 3 else []
    return " or ".join(ends[:_FEW] or (short if len(short) == 1 else []))


def make_field(name: str, annotation: str) -> Field:
    """Return a field of ours, or of an owner that declares none, from a type written as text."""
    return Field(name, ast.parse(annotation, mode="eval").body, "")


def split_union(node: ast.expr | None) -> list[ast.expr]:
    """Return the members of a union, however it is written; a type that is none alone."""
    if node is None:
        return []
    if isinstance(node, ast.BinOp):
        return split_union(node.left) + split_union(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a forward reference
        return split_union(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Subscript) and get_type_name(node.value) in ("Optional", "Union"):
        found = [part for item in get_type_arguments(node) for part in split_union(item)]
        return [*found, *([ast.Constant(None)] if get_type_name(node.value) == "Optional" else [])]
    return [node]


def get_type_arguments(node: ast.Subscript) -> list[ast.expr]:
    """Return what stands in the brackets of a type."""
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def get_type_name(node: ast.expr) -> str:
    """Return the last word of `typing.Optional` or `Optional`."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def has_fixed_length(node: ast.Subscript) -> bool:
    """Tell whether a list has one type for each place, as in `tuple[int, float]`."""
    names = [ast.unparse(item) for item in get_type_arguments(node)]
    return get_type_name(node.value) in ("tuple", "Tuple") and "..." not in names


@functools.cache
def _listed(listing: WordList) -> tuple[str, ...]:
    found: list[str] = []
    for source in listing.sources:
        module, _, name = source.partition(":")
        if listing.quoted:
            found += fields.read_quoted_words(source, listing.quoted)
        elif listing.declared:
            found += upstream_source.read_declared_names(module, name)
        elif listing.compared:
            found += upstream_source.read_compared_words(module, name, listing.compared)
        else:
            found += upstream_source.read_listed_words(module, name)
    found = [word.lower() for word in found] if listing.lower else found
    return tuple(dict.fromkeys([*found, *listing.also])) if found else ()


def _fits(node: ast.expr, value: object, module: str) -> bool:
    return any(_fits_part(part, value, module) for part in split_union(node))


def _fits_part(node: ast.expr, value: object, module: str) -> bool:
    if isinstance(node, ast.Constant):
        return node.value is None and value is None
    if isinstance(node, ast.Subscript):
        return _fits_subscript(node, value, module)
    name = get_type_name(node)
    if name in _SCALARS:
        return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
    return name == "Any" or (name in LIST_TYPES and isinstance(value, list)) or value in _enumerated(node, module)


def _fits_subscript(node: ast.Subscript, value: object, module: str) -> bool:
    name, items = get_type_name(node.value), get_type_arguments(node)
    if name == "Literal":
        return any(isinstance(item, ast.Constant) and _is_literal(item.value, value) for item in items)
    if name in MAPPING_TYPES:
        return isinstance(value, dict) and all(_fits(items[-1], v, module) for v in value.values())
    if name in LIST_TYPES and isinstance(value, list):
        if has_fixed_length(node):
            pairs = zip(items, value, strict=False)
            return len(value) == len(items) and all(_fits(item, v, module) for item, v in pairs)
        return all(_fits(items[0], v, module) for v in value)
    return False


def _is_literal(declared: object, value: object) -> bool:
    if isinstance(declared, str) and isinstance(value, str):
        return _is_word(declared, value)
    return declared == value and type(declared) is type(value)


def _is_word(declared: str, value: str) -> bool:
    """Tell whether a text is a declared word, or of its family: peft writes 'pissa_niter_[number of iters]'."""
    head, bracket, _ = declared.partition("[")
    return value.startswith(head) and value != head if bracket else declared == value


def _choices(node: ast.expr | None, module: str) -> tuple[str, ...]:
    """Return the words that a type lists: a Literal, or `SomeEnum | str`, which upstream turns into the enum."""
    found: list[str] = []
    names: list[str] = []
    for part in split_union(node):
        words = tuple(_literals(part)) or _enumerated(part, module)
        found += words
        names += [] if words else [get_type_name(part)]
    literal = any(
        isinstance(part, ast.Subscript) and get_type_name(part.value) == "Literal" for part in split_union(node)
    )
    return () if literal and "str" in names else tuple(dict.fromkeys(found))


def _literals(node: ast.expr) -> Iterator[str]:
    if isinstance(node, ast.Subscript) and get_type_name(node.value) == "Literal":
        yield from (
            i.value for i in get_type_arguments(node) if isinstance(i, ast.Constant) and isinstance(i.value, str)
        )


def _lists_words(node: ast.expr, module: str) -> bool:
    return bool(tuple(_literals(node)) or _enumerated(node, module))


def _enumerated(node: ast.expr, module: str) -> tuple[str, ...]:
    """Return the texts of an enumeration; empty where a type is none."""
    name = node.id if isinstance(node, ast.Name) else ""
    return (
        upstream_source.read_listed_words(module, name)
        if module and name and name not in _SCALARS and name != "Any"
        else ()
    )


def _union_in_words(nodes: list[ast.expr], many: bool = False) -> str:
    """Return a type in words, of one value or of `many`; a class, which YAML cannot write, only where it is alone."""
    written = {ast.unparse(node).replace("typing.", ""): node for node in nodes}
    if "float" in written:
        written.pop("int", None)
    plain = [node for text, node in written.items() if text in _IN_WORDS or isinstance(node, ast.Subscript)]
    named = [node for node in written.values() if node not in plain]
    if any(ast.unparse(node) != "None" for node in plain):
        named = []
    words = [_in_words(node, many) for node in (*named, *plain)]
    return ", or ".join(sorted(dict.fromkeys(words), key="null".__eq__))


def _in_words(node: ast.expr, many: bool) -> str:
    text = ast.unparse(node).replace("typing.", "")
    if text in _IN_WORDS:
        return _IN_WORDS[text][many]
    name = get_type_name(node.value) if isinstance(node, ast.Subscript) else ""
    of = get_type_arguments(node) if isinstance(node, ast.Subscript) else []
    if name == "Literal":
        literal = [ast.literal_eval(one) for one in of]
        words = [str(one).lower() if isinstance(one, bool) else str(one) for one in literal]
        return words[0] if len(words) == 1 else f"{'any' if many else 'one'} of {', '.join(words)}"
    if name in MAPPING_TYPES:
        whole = ast.unparse(of[1]) == "Any"
        to = "" if whole else f" of names to {_union_in_words(split_union(of[1]), many=True)}"
        return _IN_WORDS["dict"][many] + to
    if name in LIST_TYPES and isinstance(node, ast.Subscript) and has_fixed_length(node):
        return f"{_IN_WORDS['list'][many]} of {' and '.join(_union_in_words(split_union(one)) for one in of)}"
    if name in LIST_TYPES:
        return f"{_IN_WORDS['list'][many]} of {_union_in_words(split_union(of[0]), many=True)}"
    return text
