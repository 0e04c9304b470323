"""Tells whether a value from YAML is of the type that an owner declares, and describes the type in a message.

Inputs: a `Field` and a plain value. Outputs: yes or no; words for a message. Types are read as their owner writes
them: unions, literals, enumerations, containers. A class that YAML cannot write takes no value. Not here: which
keys there are (`keys`). A list of words that upstream no longer yields raises UpstreamChanged: it never accepts
every word.
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Collection

from trl_sft.recipe.upstream import fields, packages, source
from trl_sft.recipe.upstream.fields import Field, WordList
from trl_sft.suggestions import STRICT, nearest_name

_MAX_SUGGESTIONS = 3  # names that end with what the user wrote
_SHORTEST_ABBREVIATION = 4  # letters; fewer fit too many names
_SCALARS = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,), "dict": (dict,), "list": (list,)} | {
    "Dict": (dict,),  # of `typing`, without what it contains
    "List": (list,),
}
LIST_TYPES = ("list", "List", "Sequence", "tuple", "Tuple", "set")
MAPPING_TYPES = ("dict", "Dict", "Mapping")
# A type in the words of a message: one value, several values.
_DESCRIPTIONS = {
    "int": ("a whole number", "whole numbers"),
    "float": ("a number", "numbers"),
    "str": ("text", "texts"),
    "bool": ("true or false", "true or false"),
    "None": ("null", "null"),
    "False": ("false", "false"),
    "Any": ("any value", "any values"),
    "list": ("a list", "lists"),
    "dict": ("a mapping", "mappings"),
    "Dict": ("a mapping", "mappings"),
    "List": ("a list", "lists"),
}


def accepts(field: Field, value: object) -> bool:
    """Tell whether a plain value is of the type, and among the choices, that the owner declares.

    Raises UpstreamChanged if the installed owner's list of words cannot be read.
    """
    word_list = field.choices if isinstance(field.choices, WordList) else WordList(())
    if isinstance(value, str) and (choices := list_choices(field)):
        text = value.lower() if word_list.ignores_case else value
        words = text.split() if word_list.accepts_several else [text]
        return all(_is_choice(word, choices) or _matches_pattern(word, word_list) for word in words)
    if isinstance(value, list) and word_list.sources and not set(map(str, value)) <= set(list_choices(field)):
        return False
    return field.type is None or _fits(field.type, value, field.module)


def list_choices(field: Field) -> tuple[str, ...]:
    """Return the words of which a text has to be one; () if any text will do, or none.

    Raises UpstreamChanged if the owner has a list of words that cannot be read.
    """
    if isinstance(field.choices, WordList):
        words = _read_word_list(field.choices)
        places = " or ".join(f"`{place.partition(':')[2]}`" for place in field.choices.sources)
        module = field.choices.sources[0].partition(":")[0]
    elif field.choices is not None:
        words = source.read_words(field.choices, field.module)
        places, module = f"`{ast.unparse(field.choices)}`", field.module
    else:
        return _read_type_words(field.type, field.module)
    if not words:
        raise packages.changed_source(module, f"the words of the key `{field.name}` are no longer in {places}")
    return words


def describe(field: Field) -> str:
    """Return in words what a key takes: its choices where it has some, else its type."""
    choices = list_choices(field)
    if not choices:
        return _describe_union(split_union(field.type)) if field.type else "any value"
    others = [part for part in split_union(field.type) if not _read_part_words(part, field.module)]
    others = [part for part in others if ast.unparse(part) not in ("str", "None")]
    alternatives = [_describe_union(others)] if others else []
    if isinstance(field.choices, WordList):
        if field.choices.pattern_description:
            choices = (*choices, field.choices.pattern_description)
        if any(isinstance(part, ast.Subscript) and get_type_name(part.value) in LIST_TYPES for part in others):
            alternatives = ["a list of them"]
    return ", or ".join([f"one of {', '.join(choices)}", *alternatives])


def suggest(word: str, names: Collection[str]) -> str:
    """Return the key or word that a user most likely means.

    Returns:
        The first of these that exists: the nearest name; up to three names that end with `_word` ("batch_size"),
        joined by " or "; the only name of which the word is an abbreviation ("grad_acc"). "" if there is none.

    """
    if near := nearest_name(word, names, cutoff=STRICT):
        return near
    if longer := [name for name in names if name.endswith(f"_{word}")]:
        return " or ".join(longer[:_MAX_SUGGESTIONS])
    letters_in_order = ".*".join(map(re.escape, word))
    longer = [name for name in names if re.fullmatch(letters_in_order, name)]
    return longer[0] if len(longer) == 1 and len(word) >= _SHORTEST_ABBREVIATION else ""


def make_field(name: str, annotation: str) -> Field:
    """Return a field of our own, or of an owner that declares none, from a type written as text."""
    return Field(name, ast.parse(annotation, mode="eval").body, "")


def split_union(node: ast.expr | None) -> list[ast.expr]:
    """Return the members of a union, however it is written; [type] for a type alone; [] for None."""
    if node is None:
        return []
    if isinstance(node, ast.BinOp):
        return split_union(node.left) + split_union(node.right)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):  # a forward reference
        return split_union(ast.parse(node.value, mode="eval").body)
    if isinstance(node, ast.Subscript) and get_type_name(node.value) in ("Optional", "Union"):
        members = []
        for argument in get_type_arguments(node):
            members += split_union(argument)
        return [*members, ast.Constant(None)] if get_type_name(node.value) == "Optional" else members
    return [node]


def get_type_arguments(node: ast.Subscript) -> list[ast.expr]:
    """Return what stands in the brackets of a type."""
    return list(node.slice.elts) if isinstance(node.slice, ast.Tuple) else [node.slice]


def get_type_name(node: ast.expr) -> str:
    """Return the last word of `typing.Optional` or `Optional`; "" for another expression."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""


def has_fixed_length(node: ast.Subscript) -> bool:
    """Tell whether a list has one type for each place, as in `tuple[int, float]`."""
    arguments = [ast.unparse(argument) for argument in get_type_arguments(node)]
    return get_type_name(node.value) in ("tuple", "Tuple") and "..." not in arguments


@functools.cache
def _read_word_list(word_list: WordList) -> tuple[str, ...]:
    """Return the words that upstream lists and those that it takes beside them; () if it lists none."""
    words: list[str] = []
    for place in word_list.sources:
        module, _, name = place.partition(":")
        if word_list.documented_key:
            words += fields.read_quoted_words(place, word_list.documented_key)
        elif word_list.is_stub_type:
            words += source.read_declared_names(module, name)
        elif word_list.compared_variable:
            words += source.read_compared_words(module, name, word_list.compared_variable)
        else:
            words += source.read_listed_words(module, name)
    if not words:
        return ()
    words = [word.lower() for word in words] if word_list.ignores_case else words
    return tuple(dict.fromkeys([*words, *word_list.extra_words]))


def _is_choice(word: str, choices: tuple[str, ...]) -> bool:
    """Tell whether a word is one of the choices, or of a family of them."""
    return any(_is_word(choice, word) for choice in choices)


def _is_word(declared: str, word: str) -> bool:
    """Tell whether a text is a declared word, or of its family: peft writes 'pissa_niter_[number of iters]'."""
    stem, bracket, _ = declared.partition("[")
    if bracket:
        return word.startswith(stem) and word != stem
    return declared == word


def _matches_pattern(word: str, word_list: WordList) -> bool:
    """Tell whether a text that is none of the words is accepted all the same: a kernel of the hub."""
    return bool(word_list.pattern) and re.fullmatch(word_list.pattern, word) is not None


def _fits(node: ast.expr, value: object, module: str) -> bool:
    """Tell whether a value is of a type."""
    return any(_fits_part(part, value, module) for part in split_union(node))


def _fits_part(node: ast.expr, value: object, module: str) -> bool:
    """Tell whether a value is of a type that is no union."""
    if isinstance(node, ast.Constant):
        return node.value is None and value is None
    if isinstance(node, ast.Subscript):
        return _fits_subscript(node, value, module)
    name = get_type_name(node)
    if name in _SCALARS:
        # in Python, true and false are integers
        return isinstance(value, _SCALARS[name]) and (name == "bool" or not isinstance(value, bool))
    if name == "Any" or (name in LIST_TYPES and isinstance(value, list)):
        return True
    return value in _read_enumeration(node, module)


def _fits_subscript(node: ast.Subscript, value: object, module: str) -> bool:
    """Tell whether a value is of a type with brackets: a literal, a mapping or a list."""
    name, arguments = get_type_name(node.value), get_type_arguments(node)
    if name == "Literal":
        literals = [argument.value for argument in arguments if isinstance(argument, ast.Constant)]
        return any(_is_literal(literal, value) for literal in literals)
    if name in MAPPING_TYPES:
        return isinstance(value, dict) and all(_fits(arguments[-1], item, module) for item in value.values())
    if name not in LIST_TYPES or not isinstance(value, list):
        return False
    if not has_fixed_length(node):
        return all(_fits(arguments[0], item, module) for item in value)
    if len(value) != len(arguments):
        return False
    return all(_fits(argument, item, module) for argument, item in zip(arguments, value, strict=True))


def _is_literal(declared: object, value: object) -> bool:
    """Tell whether a value is a declared literal."""
    if isinstance(declared, str) and isinstance(value, str):
        return _is_word(declared, value)
    return declared == value and type(declared) is type(value)


def _read_type_words(node: ast.expr | None, module: str) -> tuple[str, ...]:
    """Return the words that a type lists: a Literal, or `SomeEnum | str`, whose text upstream turns into the enum.

    `Literal[...] | str` takes any text, so it lists none.
    """
    members = split_union(node)
    names = [get_type_name(member) for member in members]
    words: list[str] = []
    has_literal = False
    for member in members:
        words += _read_part_words(member, module)
        has_literal = has_literal or bool(_list_literals(member))
        if "str" in names:
            _require_definition(member, module)
    return () if has_literal and "str" in names else tuple(dict.fromkeys(words))


def _read_part_words(node: ast.expr, module: str) -> tuple[str, ...]:
    """Return the words that a type that is no union lists; () if it lists none."""
    return tuple(_list_literals(node)) or _read_enumeration(node, module)


def _list_literals(node: ast.expr) -> list[str]:
    """Return the texts of a Literal."""
    if not isinstance(node, ast.Subscript) or get_type_name(node.value) != "Literal":
        return []
    literals = [argument.value for argument in get_type_arguments(node) if isinstance(argument, ast.Constant)]
    return [literal for literal in literals if isinstance(literal, str)]


def _read_enumeration(node: ast.expr, module: str) -> tuple[str, ...]:
    """Return the texts of an enumeration; () if a type is none. Raises UpstreamChanged if it has no texts."""
    if not _is_class_of_owner(node, module):
        return ()
    name = get_type_name(node)
    words = source.read_listed_words(module, name)
    if not words and source.is_enumeration(module, name):
        home = source.resolve(module, name)[0]
        raise packages.changed_source(home, f"the enumeration `{name}` no longer lists its words")
    return words


def _require_definition(node: ast.expr, module: str) -> None:
    """Raise UpstreamChanged if a class that stands beside `str` is not defined where its import says.

    It may be an enumeration, and without its words every text would be accepted.
    """
    if not _is_class_of_owner(node, module):
        return
    home, name = source.resolve(module, get_type_name(node))
    if home.partition(".")[0] in packages.PACKAGES and source.find_statement(home, name) is None:
        raise packages.changed_source(home, f"`{name}` is no longer in this file")


def _is_class_of_owner(node: ast.expr, module: str) -> bool:
    """Tell whether a type is a class of the owner's, not one of Python's."""
    return bool(module) and isinstance(node, ast.Name) and node.id not in (*_SCALARS, *LIST_TYPES, "Any")


def _describe_union(members: list[ast.expr], plural: bool = False) -> str:
    """Return the members of a union in words, in the singular or the plural.

    A class, which YAML cannot write, is named only where nothing else can be written.
    """
    by_text = {_unparse_type(member): member for member in members}
    if "float" in by_text:
        by_text.pop("int", None)
    writable = [node for text, node in by_text.items() if text in _DESCRIPTIONS or isinstance(node, ast.Subscript)]
    classes = [node for node in by_text.values() if node not in writable]
    if any(_unparse_type(node) != "None" for node in writable):
        classes = []
    descriptions = dict.fromkeys(_describe_part(node, plural) for node in (*classes, *writable))
    return ", or ".join(sorted(descriptions, key=lambda text: text == "null"))  # null stands last


def _describe_part(node: ast.expr, plural: bool) -> str:
    """Return a type that is no union in words, in the singular or the plural."""
    text = _unparse_type(node)
    if text in _DESCRIPTIONS:
        return _DESCRIPTIONS[text][plural]
    if not isinstance(node, ast.Subscript):
        return text
    name, arguments = get_type_name(node.value), get_type_arguments(node)
    if name == "Literal":
        return _describe_literal(arguments, plural)
    if name in MAPPING_TYPES:
        mapping = _DESCRIPTIONS["dict"][plural]
        if ast.unparse(arguments[1]) == "Any":
            return mapping
        return f"{mapping} of names to {_describe_union(split_union(arguments[1]), plural=True)}"
    if name in LIST_TYPES and has_fixed_length(node):
        items = [_describe_union(split_union(argument)) for argument in arguments]
        return f"{_DESCRIPTIONS['list'][plural]} of {' and '.join(items)}"
    if name in LIST_TYPES:
        return f"{_DESCRIPTIONS['list'][plural]} of {_describe_union(split_union(arguments[0]), plural=True)}"
    return text


def _describe_literal(arguments: list[ast.expr], plural: bool) -> str:
    """Return the values of a Literal in words, as YAML writes them."""
    literals = [ast.literal_eval(argument) for argument in arguments]
    texts = [str(literal).lower() if isinstance(literal, bool) else str(literal) for literal in literals]
    if len(texts) == 1:
        return texts[0]
    return f"{'any' if plural else 'one'} of {', '.join(texts)}"


def _unparse_type(node: ast.expr) -> str:
    """Return a type as text without the module `typing`."""
    return ast.unparse(node).replace("typing.", "")
