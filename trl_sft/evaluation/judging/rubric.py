"""The rubric: qualities of an answer, each a question with five described levels, from 1 to 5.

Inputs: `rubric.yaml` of this folder, or a file of the user's in the same form. Outputs: `RubricDimension`s. Not here:
how a judge is asked (`judge_questions`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from trl_sft import console, user_paths
from trl_sft.errors import DataError, Fault, first_line
from trl_sft.evaluation.judging.judge_questions import LANGUAGES, SCORES

_SHIPPED = Path(__file__).parent / "rubric.yaml"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")
_REFERENCE = "needs_reference"
_FORM = "as in the rubric of the project: `question`, and `levels` from 1 to 5, below `en` or `zh`"


class RubricText(NamedTuple):
    """A dimension in one language."""

    question: str
    levels: tuple[str, ...]  # of the scores 1 to 5


@dataclass(frozen=True)
class RubricDimension:
    """One quality of an answer."""

    name: str
    needs_reference: bool  # whether only rows with a reference answer are scored
    texts: Mapping[str, RubricText]  # by language

    def choose_text(self, language: str) -> tuple[str, RubricText]:
        """Return the text in a language, or in the one that there is; and which it is."""
        chosen = language if language in self.texts else next(iter(self.texts))
        return chosen, self.texts[chosen]


def read_rubric(path: Path | None = None) -> dict[str, RubricDimension]:
    """Return the dimensions of a rubric by their names.

    Args:
        path: of the user's file; None = the rubric of the project.

    Raises:
        DataError: the file cannot be read, or has another form; all faults at once.

    """
    if path is not None:
        user_paths.check("--rubric", path, user_paths.FILE)
    where = str(path or _SHIPPED)
    try:
        content = yaml.safe_load((path or _SHIPPED).read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        problem = f"the rubric cannot be read: {first_line(error)}"
        raise DataError(Fault(where, problem, "Correct the path or the file.", code="judge.bad_rubric")) from None
    if not isinstance(content, dict) or not content:
        problem = "the rubric is no mapping of dimensions"
        raise DataError(Fault(where, problem, f"Write it {_FORM}.", code="judge.bad_rubric"))
    dimensions, faults = {}, []
    for name, entry in content.items():
        read = _read_dimension(name, entry)
        if isinstance(read, str):
            fix = f"Correct the dimension. Write it {_FORM}."
            faults.append(Fault(f"{where} {name}", read, fix, code="judge.bad_rubric"))
        else:
            dimensions[read.name] = read
    if faults:
        raise DataError(faults)
    return dimensions


def choose_dimensions(rubric: Mapping[str, RubricDimension], names: str) -> list[RubricDimension]:
    """Return dimensions by their names, separated by commas; `all` = each, "" = none. Raises DataError."""
    if names.strip() == "all":
        return list(rubric.values())
    chosen = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in rubric:
            fix = f"Write `all`, or some of {console.format_names(list(rubric), most=20)}."
            problem = f"the rubric has no dimension {name}"
            raise DataError(Fault("--dimensions", problem, fix, code="judge.bad_rubric"))
        if rubric[name] not in chosen:
            chosen.append(rubric[name])
    return chosen


def _read_dimension(name: Any, entry: Any) -> RubricDimension | str:
    """Return a dimension, or what is wrong with it."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return "the name of a dimension has lower-case letters, digits and _ only"
    if not isinstance(entry, dict):
        return "the dimension is no mapping"
    unknown = [key for key in entry if key not in (*LANGUAGES, _REFERENCE)]
    if unknown:
        return f"the key {unknown[0]} is unknown"
    needs_reference = entry.get(_REFERENCE, False)
    if not isinstance(needs_reference, bool):
        return f"`{_REFERENCE}` is neither true nor false"
    texts: dict[str, RubricText] = {}
    for language in LANGUAGES:
        if language in entry:
            text = _read_text(entry[language])
            if isinstance(text, str):
                return f"{language}: {text}"
            texts[language] = text
    if not texts:
        return "the dimension has neither `en` nor `zh`"
    return RubricDimension(name, needs_reference, texts)


def _read_text(entry: Any) -> RubricText | str:
    """Return the text of a dimension in one language, or what is wrong with it."""
    if not isinstance(entry, dict) or set(entry) != {"question", "levels"}:
        return "it needs `question` and `levels`, and nothing else"
    question, levels = entry["question"], entry["levels"]
    if not isinstance(question, str) or not question.strip():
        return "`question` is no text"
    if not isinstance(levels, dict) or sorted(map(str, levels)) != list(SCORES):
        return "`levels` needs the keys 1, 2, 3, 4 and 5"
    described = {str(number): text for number, text in levels.items()}
    if not all(isinstance(text, str) and text.strip() for text in described.values()):
        return "each level needs a text that describes it"
    return RubricText(question.strip(), tuple(described[number].strip() for number in SCORES))
