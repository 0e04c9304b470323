"""Finds definitions and lists of words in the source text of the installed packages, without importing them.

Inputs: a module (`package.module`) and a name. Outputs: the `ast` node of a definition, the module that holds
it, or the words that it lists. Only the statement asked for is parsed: the files are long, and importing TRL
takes seconds. Reflection on the imported classes was tried and measured (docs/development/log.md, 2026-11-25).
Not here: the fields of a dataclass and the arguments of a function (`fields`).
"""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterable, Iterator, Mapping

from trl_sft.recipe.upstream import packages

_IMPORT = re.compile(r"^[ \t]*from[ \t]+(\.*)([\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n(]+)", re.MULTILINE)
_TOP_LEVEL_LINE = re.compile(r"^[^\s)\]}]", re.MULTILINE)  # a line that can begin a new statement

# What reads as the words of its arguments.
_CONTAINERS = ("dict", "list", "tuple", "sorted", "set")


@functools.cache
def find_statement(module: str, name: str) -> ast.stmt | None:
    """Return the class, function or assignment of a name at the top level of a module; None if it has none.

    Of several, the last one counts, as in Python.
    """
    text = packages.read_text(module)
    pattern = rf"^(?:(?:class|def|async def)[ ]+{name}\b|{name}[ ]*(?::[^=\n]+)?=(?!=))"
    starts = [match.start() for match in re.finditer(pattern, text, re.MULTILINE)]
    return _parse_statement(text, starts[-1]) if starts else None


def find_function(module: str, path: str) -> ast.FunctionDef | None:
    """Return the definition of `function` or `Class.method`; None if the module has none."""
    name, _, method = path.partition(".")
    node = find_statement(module, name)
    if isinstance(node, ast.ClassDef):
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef)]
        node = next((item for item in methods if item.name == method), None)
    return node if isinstance(node, ast.FunctionDef) else None


def get_function(module: str, path: str) -> ast.FunctionDef:
    """Return the definition of `function` or `Class.method`. Raises UpstreamChanged if the module has none."""
    node = find_function(module, path)
    if node is None:
        raise packages.changed_source(module, f"`{path}` is no longer in this file")
    return node


@functools.cache
def resolve(module: str, name: str) -> tuple[str, str]:
    """Return where a name that a module uses is defined.

    Args:
        module: the module that uses the name.
        name: a class, function, constant or imported module.

    Returns:
        The module of the definition, through all imports, and the name there. Where the name is itself a module:
        (`package.name`, name). Where the imports lead to no source file: the last module that they name.

    """
    if not module or find_statement(module, name) is not None or name not in read_imports(module):
        return module, name
    origin, original_name = read_imports(module)[name]
    if packages.find_file(f"{origin}.{original_name}"):  # a module imported by its name
        return f"{origin}.{original_name}", original_name
    if origin == module or not packages.find_file(origin):
        return origin, original_name
    return resolve(origin, original_name)


@functools.cache
def read_imports(module: str) -> Mapping[str, tuple[str, str]]:
    """Return the names that `from ... import` brings into a module.

    Returns:
        Local name -> (module that it is imported from, its name there).

    """
    origins: dict[str, tuple[str, str]] = {}
    file = packages.find_file(module)
    is_package = file is not None and file.stem == "__init__"
    for dots, tail, names in _IMPORT.findall(packages.read_text(module)):
        parents = module.split(".")
        parents = parents[: len(parents) - len(dots) + is_package] if dots else []
        origin = ".".join([*parents, tail]).strip(".")
        for item in re.sub(r"#[^\n]*|[()\\]", "", names).split(","):
            if parts := item.split():  # `name` or `name as local_name`
                origins.setdefault(parts[-1], (origin, parts[0]))
    return origins


def read_words(expression: ast.AST | None, module: str, function: ast.AST | None = None) -> tuple[str, ...]:
    """Return the texts that an expression lists.

    Args:
        expression: a text, a list, a mapping (its keys), an enumeration, a call that returns such, or a sum of them.
        module: the module in which the names of the expression are looked up.
        function: the function in which the expression stands, for its local variables.

    Returns:
        The texts in their order; () if the expression is of another kind. Whoever needs words must treat ()
        as an error (`packages.changed_source`).

    """
    match expression:
        case ast.Constant(value=str(text)):
            return (text,)
        case ast.List(elts=items) | ast.Tuple(elts=items) | ast.Set(elts=items):
            return _read_all(items, module, function)
        case ast.Dict(keys=keys, values=values):
            # `{**other}` is a value without a key: its words are those of `other`
            pairs = zip(keys, values, strict=True)
            return _read_all((value if key is None else key for key, value in pairs), module, function)
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _read_all((left, right), module, function)
        case ast.IfExp(body=body, orelse=otherwise):
            return _read_all((body, otherwise), module, function)
        case ast.ListComp(elt=ast.Attribute(attr="value"), generators=[generator]):
            # `[member.value for member in Enumeration]`
            return read_words(generator.iter, module, function)
        case ast.Call(func=ast.Attribute(value=value, attr="keys" | "copy")):
            return read_words(value, module, function)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in _CONTAINERS:
            named = [ast.Constant(word.arg) if word.arg else word.value for word in keywords]
            return _read_all((*args, *named), module, function)
        case ast.Call(func=called):
            return read_words(called, module, function)
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            # an attribute of a module, of a class, or a member of an enumeration
            in_module = read_listed_words(resolve(module, name)[0], attribute)
            return in_module or read_listed_words(module, f"{name}.{attribute}")
        case ast.Name(id=name):
            local = list(_find_assigned_values(function, name))
            return read_words(local[-1], module, function) if local else read_listed_words(module, name)
    return ()


def _read_all(expressions: Iterable[ast.AST], module: str, function: ast.AST | None) -> tuple[str, ...]:
    """Return the words of several expressions, one after the other."""
    words: list[str] = []
    for expression in expressions:
        words += read_words(expression, module, function)
    return tuple(words)


@functools.cache
def read_listed_words(module: str, path: str) -> tuple[str, ...]:
    """Return the texts that a definition lists; () if it lists none.

    Args:
        module: the module that defines or imports it.
        path: an enumeration, a constant, a function (what its last return lists), or `Class.attribute`.

    """
    name, _, attribute = path.partition(".")
    module, name = resolve(module, name)
    node = find_statement(module, name) if module else None
    match node:
        case ast.ClassDef(body=body) if attribute or is_enumeration(module, name):
            assignments = [item for item in _walk_statements(body) if isinstance(item, ast.Assign)]
            if attribute:
                assignments = [item for item in assignments if _assigns(item, attribute)]
            return _read_all((item.value for item in assignments), module, None)
        case ast.FunctionDef():
            results = [item.value for item in ast.walk(node) if isinstance(item, ast.Return) and item.value]
            return read_words(results[-1], module, node) if results else ()
        case ast.Assign(value=value) | ast.AnnAssign(value=ast.expr() as value):
            return read_words(value, module)
    return ()


def is_enumeration(module: str, name: str) -> bool:
    """Tell whether a class is an enumeration: a base is called so, or is itself one."""
    module, name = resolve(module, name)
    node = find_statement(module, name) if module else None
    bases = node.bases if isinstance(node, ast.ClassDef) else []
    for base in bases:
        if "Enum" in ast.unparse(base):
            return True
        if isinstance(base, ast.Name) and is_enumeration(module, base.id):
            return True
    return False


@functools.cache
def read_compared_words(module: str, path: str, variable: str) -> tuple[str, ...]:
    """Return the words with which a function compares a variable, as in `if x not in ["a", "b"]`; () if none.

    Raises UpstreamChanged if the function is not there.
    """
    function = get_function(module, path)
    for item in ast.walk(function):
        if isinstance(item, ast.Compare) and isinstance(item.ops[0], ast.In | ast.NotIn):
            words = read_words(item.comparators[0], module, function)
            if words and ast.unparse(item.left) == variable:
                return words
    return ()


def read_declared_names(module: str, kind: str) -> tuple[str, ...]:
    """Return the names that a stub declares to be of a type, as in `float32: dtype = ...`."""
    return tuple(re.findall(rf"^(\w+): {kind} = ", packages.read_text(module), re.MULTILINE))


def look_up_name(module: str, constant: str, word: str) -> str:
    """Look up a word in a constant mapping, and return the name that stands as its value.

    Args:
        module: the module of the mapping.
        constant: the name of the mapping; its keys are texts or members of enumerations, its values are names.
            An entry `**dict.fromkeys([keys], name)` counts as one entry for each of its keys.
        word: the text of the key.

    Returns:
        The name; "" if the mapping has no such key.

    Raises:
        UpstreamChanged: the module has no such mapping.

    """
    node = find_statement(module, constant)
    mapping = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
    if not isinstance(mapping, ast.Dict):
        raise packages.changed_source(module, f"`{constant}` is no longer in this file")
    for key, value in zip(mapping.keys, mapping.values, strict=True):
        keys, target = key, value
        if isinstance(value, ast.Call) and ast.unparse(value.func) == "dict.fromkeys":
            keys, target = value.args
        if isinstance(target, ast.Name) and word in read_words(keys, module):
            return target.id
    return ""


def _walk_statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield the statements of a class, those inside `if` too, in their order."""
    for item in body:
        yield item
        if isinstance(item, ast.If):
            yield from _walk_statements((*item.body, *item.orelse))


def _find_assigned_values(function: ast.AST | None, name: str) -> Iterator[ast.expr]:
    """Yield what a function assigns to a local variable."""
    for node in ast.walk(function) if function else ():
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value and _assigns(node, name):
            yield node.value


def _assigns(node: ast.Assign | ast.AnnAssign, name: str) -> bool:
    """Tell whether a statement assigns to a name."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return any(isinstance(target, ast.Name) and target.id == name for target in targets)


def _parse_statement(text: str, start: int) -> ast.stmt | None:
    """Return the statement that begins at `start`.

    It ends before the first line without indentation where the text up to that line can be parsed.
    """
    ends = [match.start() for match in _TOP_LEVEL_LINE.finditer(text, start + 1)]
    for end in (*ends, len(text)):
        try:
            return ast.parse(text[start:end]).body[0]
        except SyntaxError:  # this line is still inside brackets or a text
            continue
    return None
