"""Which checks an answer gets: read from a row, from the command line, or chosen by what the reference answers are.

Inputs: `numeric`, `regex:PATTERN`, `json_schema:FILE`, `{"instructions": {...}}`, `FILE.py:FUNCTION`. Outputs:
`RequestedCheck`s, the first of which decides whether an answer is better. Not here: scores (the other modules), and who
permits code to run (`cli.evaluate`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft.data import user_function
from trl_sft.errors import DataError, Fault, first_line
from trl_sft.evaluation import refusals
from trl_sft.evaluation.checks import (
    code_tests,
    instructions,
    json_answer,
    number_match,
    overlap,
    text_match,
)
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.recipe import answer_checks, paths
from trl_sft.suggestions import LOOSE, nearest_name

CODE = "code"
PARAMETERS = "parameters"  # what a check needs: values that the row or the user gives it
_REFERENCE, _NOTHING, _EITHER = "reference", "nothing", "either"
_SHORT_WORDS = 10  # of a reference answer that is compared as a whole
_SHORT_SHARE = 0.9  # of the references, that are short
_GSM8K = re.compile(r"####\s*\S*\d")
_ONLY_NUMBER = re.compile(r"\s*[-+−]?\s?[$€£¥]?\s?[\d.,]*\d\s?%?\.?\s*")


class Check(NamedTuple):
    """A rule that scores answers."""

    name: str  # in files and on the screen
    function: Callable[[CheckedAnswer], float]
    needs: str = _REFERENCE  # what it compares an answer with
    tie_margin: float = 0.0  # a difference of at most this is a tie


class RequestedCheck(NamedTuple):
    """A check with the parameters of a row."""

    check: Check
    parameters: Any = None

    def score(self, checked: CheckedAnswer) -> float:
        """Return the score of an answer, from 0 to 1."""
        return self.check.function(checked._replace(parameters=self.parameters))


CHECKS = {
    check.name: check
    for check in (
        Check("exact", text_match.check_exact),
        Check("normalised", text_match.check_normalised),
        Check("numeric", number_match.check_number),
        Check("contains", text_match.check_contains, _EITHER),
        Check("regex", text_match.check_regex, PARAMETERS),
        Check("json", json_answer.check_json, _NOTHING),
        Check("json_equal", json_answer.check_json_equal),
        Check("json_schema", json_answer.check_json_schema, PARAMETERS),
        Check(CODE, code_tests.check_code, _NOTHING),
        Check("instructions", instructions.check_instructions, PARAMETERS),
        Check("refusal", refusals.check_refusal, _NOTHING),
        Check("no_refusal", refusals.check_no_refusal, _NOTHING),
        Check("chrf", overlap.check_chrf, _REFERENCE, overlap.TIE_MARGIN),
        Check("bleu", overlap.check_bleu, _REFERENCE, overlap.TIE_MARGIN),
    )
}


def read_requests(value: Any, *, folder: Path, where: str) -> list[RequestedCheck]:
    """Return the checks that a row or the command line names.

    Args:
        value: a name, `NAME:PARAMETER`, `FILE.py:FUNCTION`, a mapping from names to parameters, or a list of these.
        folder: which paths are relative to.
        where: the row, or the option.

    Raises:
        DataError: there is no such check, or its parameters cannot be used.

    """
    if isinstance(value, list):
        return [request for item in value for request in read_requests(item, folder=folder, where=where)]
    if isinstance(value, Mapping):
        return [_build(str(name), parameters, folder=folder, where=where) for name, parameters in value.items()]
    if not isinstance(value, str) or not value.strip():
        fix = f"Write the name of a check: {', '.join(CHECKS)}, or FILE.py:FUNCTION."
        raise DataError(Fault(where, f"the check is {value!r}", fix, code="evaluation.bad_check"))
    name, colon, rest = value.partition(":")
    if name in CHECKS:
        return [_build(name, rest if colon else None, folder=folder, where=where)]
    return [_build(value, None, folder=folder, where=where)]


def read_by_task(values: Sequence[str], *, folder: Path, where: str) -> dict[str, list[RequestedCheck]]:
    """Return the checks of the command line or of a recipe by task; "" = every task.

    Args:
        values: each as `CHECK`, `CHECK,CHECK` or `TASK=CHECK`.
        folder: which paths are relative to.
        where: the option, or the key of the recipe.

    Raises:
        DataError: there is no such check, or its parameters cannot be used.

    """
    requested: dict[str, list[RequestedCheck]] = {}
    for value in values:
        task, written = answer_checks.split_task(value)
        requested.setdefault(task, []).extend(read_requests(written, folder=folder, where=f"{where} {value}"))
    return requested


def choose_checks(references: Sequence[str]) -> list[RequestedCheck]:
    """Return the checks that fit reference answers of one task, by fixed rules; the first one decides.

    All end with GSM8K's `#### N`, or are a number: `numeric`. All are JSON objects or lists: `json_equal`. Nine of ten
    have at most ten words: `normalised`. Else: `chrf`.

    Args:
        references: of the rows that have one.

    Returns:
        The checks; [] = there is no reference.

    """
    if not references:
        return []
    if all(_GSM8K.search(text) for text in references):
        names = ["numeric"]
    elif all(_ONLY_NUMBER.fullmatch(text) for text in references):
        names = ["numeric", "exact"]
    elif all(isinstance(json_answer.read_json(text), dict | list) for text in references):
        names = ["json_equal", "json"]
    elif sum(text_match.count_words(text) <= _SHORT_WORDS for text in references) >= _SHORT_SHARE * len(references):
        names = ["normalised", "exact"]
    else:
        names = ["chrf", "bleu"]
    return [RequestedCheck(CHECKS[name]) for name in names]


def find_missing_reference(request: RequestedCheck, reference: str) -> str:
    """Return what a row lacks for a check; "" = nothing."""
    needs = request.check.needs
    if needs == _REFERENCE and not reference.strip():
        return f"the check `{request.check.name}` compares with a reference answer, and the row has none"
    if needs == _EITHER and request.parameters is None and not reference.strip():
        return f"the check `{request.check.name}` needs a text or a reference answer, and the row has none"
    return ""


def _build(name: str, parameters: Any, *, folder: Path, where: str) -> RequestedCheck:
    """Return one check with its parameters. Raises DataError."""
    check = CHECKS.get(name)
    if check is None:
        return RequestedCheck(_import_check(name, folder=folder, where=where), parameters)
    if check.needs == PARAMETERS and parameters is None:
        examples = {"regex": "regex:PATTERN", "json_schema": "json_schema:FILE"}
        fix = f"Write `{examples.get(name, '{' + name + ': {...}} in the row')}`."
        raise DataError(Fault(where, f"the check `{name}` needs a value", fix, code="evaluation.bad_check"))
    if check.needs in (_REFERENCE, _NOTHING) and parameters is not None and name != CODE:
        problem = f"the check `{name}` takes no value, and has {parameters!r}"
        raise DataError(Fault(where, problem, f"Write `{name}`.", code="evaluation.bad_check"))
    problem = ""
    if name == "json_schema" and isinstance(parameters, str):
        parameters = _read_schema(parameters, folder=folder, where=where)
    elif name == "regex" and not isinstance(parameters, str):
        problem = f"the pattern is {parameters!r}"
    elif name == "instructions":
        problem = instructions.find_unusable(parameters)
    elif name == CODE and not (
        parameters is None or (isinstance(parameters, Mapping) and set(parameters) == {"tests"})
    ):
        problem = f"the value of `code` is {parameters!r}"
    if problem:
        fix = "Correct the value; docs/how-to/evaluate.md shows each check."
        raise DataError(Fault(where, problem, fix, code="evaluation.bad_check"))
    if name == "regex":
        text_match.compile_pattern(parameters)
    if name == "json_schema":
        json_answer.build_validator(json.dumps(parameters, sort_keys=True))
    return RequestedCheck(check, parameters)


def _read_schema(value: str, *, folder: Path, where: str) -> Any:
    """Return the JSON Schema of a file. Raises DataError."""
    path = paths.make_absolute(value, folder)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fix = "Name a file with a JSON Schema."
        raise DataError(Fault(where, f"{value}: {first_line(error)}", fix, code="evaluation.bad_check")) from None


def _import_check(name: str, *, folder: Path, where: str) -> Check:
    """Return the check of the user's function `FILE.py:FUNCTION`. Raises DataError."""
    if ":" not in name:
        similar = nearest_name(name, CHECKS, cutoff=LOOSE)
        fix = f"Did you mean `{similar}`?" if similar else f"Write one of {', '.join(CHECKS)}, or FILE.py:FUNCTION."
        raise DataError(Fault(where, f"there is no check `{name}`", fix, code="evaluation.bad_check"))
    location = paths.resolve_function(name, folder)
    if isinstance(location, paths.LocationProblem):
        raise DataError(Fault(where, f"{name}: {location.problem}", location.fix, code="evaluation.bad_check"))
    try:
        function = user_function.import_function(location)
    except (Exception, SystemExit) as error:
        problem = f"{name} cannot be imported: {type(error).__name__}: {first_line(error)}"
        fix = f"Correct {location.file.name}."
        raise DataError(Fault(where, problem, fix, code="evaluation.bad_check")) from None
    return Check(f"{location.file.name}:{location.name}", _wrap(function, location), _NOTHING)


def _wrap(function: Callable[..., Any], location: paths.FunctionLocation) -> Callable[[CheckedAnswer], float]:
    """Return a check that calls the user's function with a mapping, and takes a number from 0 to 1, or a bool."""
    name = f"{location.file.name}:{location.name}"

    def score(checked: CheckedAnswer) -> float:
        row = {"answer": checked.answer, "reference": checked.reference, "prompt": checked.prompt, "task": checked.task}
        try:
            value = function(row)
        except (Exception, SystemExit) as error:
            problem = f"it raised {type(error).__name__}: {first_line(error)}, on the answer {checked.answer[:80]!r}"
            fix = f"Correct {location.name} in {location.file.name}."
            raise DataError(Fault(name, problem, fix, code="evaluation.failed_check")) from None
        is_number = isinstance(value, bool | int | float) or hasattr(value, "__float__")
        if not is_number or not 0 <= float(value) <= 1:
            problem = f"it returned {value!r}"
            fix = "Return a number from 0 to 1, or True or False."
            raise DataError(Fault(name, problem, fix, code="evaluation.failed_check"))
        return float(value)

    return score
