"""The user's own formatting function, `format: FILE.py:FUNCTION`: imported, called with a row, hashed for the cache.

Inputs: the function's location and a row. Outputs: the columns of a known format. Deliberately not here: what the
columns mean (`formats`).
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trl_sft.data.messages import FormatError
from trl_sft.errors import first_line
from trl_sft.recipe.paths import FunctionLocation


@functools.cache
def import_function(location: FunctionLocation) -> Callable[[Mapping[str, Any]], Any]:
    """Return the user's formatting function.

    Raises:
        AttributeError: the file has no such name.
        TypeError: the name is no function.
        Exception: whatever the user's file raises on import.

    """
    if str(location.root) not in sys.path:
        sys.path.append(str(location.root))  # at the end, so that no file beside the function hides a package
    if location.as_module:
        module = importlib.import_module(location.module)
    else:  # by its path: a file that has the name of a module of Python is then still the user's
        name = f"trl_sft_format_{location.module}"
        spec = importlib.util.spec_from_file_location(name, location.file)
        assert spec is not None, location.file
        assert spec.loader is not None, location.file
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    function = getattr(module, location.name, None)
    if function is None:
        raise AttributeError(f"{location.file.name} has no {location.name}")
    if not callable(function):
        raise TypeError(f"{location.name} is {type(function).__name__}, not a function")
    return function  # type: ignore[no-any-return]


def call_function(location: FunctionLocation, row: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the columns that the user's function makes of a row; None = it drops the row.

    Raises:
        FormatError: the function raised, or returned something other than a mapping, a text or None.

    """
    try:
        columns = import_function(location)(row)
    except (Exception, SystemExit) as error:
        problem = f"{location.name} raised {type(error).__name__}: {first_line(error)}"
        fix = f"Correct {location.name} in {location.file.name}."
        raise FormatError(problem, fix, code="data.function_failed") from None
    if columns is None:
        return None
    if isinstance(columns, str):
        return {"text": columns}
    if not isinstance(columns, Mapping):
        fix = (
            "Return a mapping with the columns of a format, as messages, or prompt and completion; return a text; "
            "or return None to drop the row."
        )
        raise FormatError(f"{location.name} returned {type(columns).__name__}", fix, code="data.function_result")
    return dict(columns)


def digest_modules(location: FunctionLocation) -> list[str]:
    """Return the sha256 of the function's file and of every module that was loaded from its folder."""
    files = {location.file}
    for module in list(sys.modules.values()):
        name = getattr(module, "__file__", None)
        file = Path(str(name)) if name else None
        if file and file.is_relative_to(location.root) and "site-packages" not in file.parts and file.is_file():
            files.add(file)
    return [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
