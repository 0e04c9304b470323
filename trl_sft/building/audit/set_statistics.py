"""What is in a set as a whole: lengths, languages, turns, tasks, first words, and how even they are.

In: rows, one after another. Out: a mapping that JSON can write, and findings about the balance. Counts are kept, and
one number for each row. Not here: faults of single rows (`building.gates`).
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates import language, language_names
from trl_sft.data import text_matches

QUANTILES = (0.0, 0.1, 0.5, 0.9, 0.99, 1.0)
_BINS = 20  # of a histogram
_FIRST_WORDS = 2  # of an instruction, by which templates are seen
_SHOWN = 12  # entries of a table
_MOST_SHARE = 0.5  # of one task, from which a set is called unbalanced
_MOST_BEGINNING = 0.2  # of the rows that begin with the same words
_LEAST_ROWS = 50  # of a set whose balance is judged
_SECOND_LANGUAGE = 0.005  # of the rows, from which a second language is a finding


class SetStatistics:
    """Counts what the rows of a set are like."""

    def __init__(self, unit: str, identify: Callable[[str], str] | None = None) -> None:
        """Begin with no row.

        Args:
            unit: of lengths: tokens, or words.
            identify: returns the language of a text; None = scripts are counted instead.

        """
        self.unit = unit
        self._identify = identify
        self._lengths, self._answers = array("l"), array("l")
        self._languages: Counter[str] = Counter()
        self._scripts: Counter[str] = Counter()
        self._turns: Counter[str] = Counter()
        self._tasks: Counter[str] = Counter()
        self._beginnings: Counter[str] = Counter()

    def add(self, row: CandidateRow, *, task: str, length: int, answer_length: int) -> None:
        """Count a row.

        Args:
            row: the row.
            task: its task; "" = none.
            length: of all its turns, in the unit.
            answer_length: of its last answer.

        """
        self._lengths.append(length)
        self._answers.append(answer_length)
        answers = sum(turn.get("role") == "assistant" for turn in row.messages)
        self._turns["one answer" if answers == 1 else "several answers"] += 1
        text = row.instruction or row.answer
        self._scripts[language.find_language(text)] += 1
        if self._identify:
            self._languages[self._identify(text)] += 1
        if task:
            self._tasks[task] += 1
        words = text_matches.split_words(row.instruction[:100])[:_FIRST_WORDS]
        if words:
            self._beginnings[" ".join(words)] += 1

    def describe(self) -> dict[str, Any]:
        """Return everything as a mapping that JSON can write."""
        return {
            "unit": self.unit,
            "lengths": _describe_lengths(self._lengths),
            "answer_lengths": _describe_lengths(self._answers),
            "languages": _describe_counts(self._languages if self._identify else self._scripts),
            "languages_are": "languages" if self._identify else "scripts",
            "turns": _describe_counts(self._turns),
            "tasks": _describe_counts(self._tasks),
            "beginnings": _describe_counts(self._beginnings),
        }

    def list_findings(self) -> Iterator[tuple[str, str]]:
        """Yield what is uneven in the set: a sentence, and what to do in the imperative."""
        rows = len(self._lengths)
        if rows < _LEAST_ROWS:
            return
        if len(self._tasks) > 1:
            task, count = self._tasks.most_common(1)[0]
            if count > _MOST_SHARE * rows:
                cells = compute_effective_number(self._tasks)
                text = f"{count / rows:.0%} of the rows are of the task {task}; {len(self._tasks)} tasks"
                yield (
                    f"{text} are as even as {cells:.1f} equal ones",
                    "Give the other tasks more weight: `weight` in the sources of a recipe.",
                )
        beginning, count = next(iter(self._beginnings.most_common(1)), ("", 0))
        if count > _MOST_BEGINNING * rows:
            yield (
                f"{count / rows:.0%} of the instructions begin with {beginning!r}",
                "Vary the wording of the instructions.",
            )
        yield from itertools.islice(self._find_second_languages(), 1)

    def _find_second_languages(self) -> Iterator[tuple[str, str]]:
        """Yield a finding where a set has a second language, and one where it has a second script."""
        fix = "Check that both are meant; name the language of the set with --language."
        least = _SECOND_LANGUAGE * len(self._lengths)
        for counts, is_script in ((self._languages, False), (self._scripts, True)):
            known = [(name, number) for name, number in counts.most_common(3) if name != language_names.UNKNOWN]
            if len(known) < 2 or known[1][1] < least:
                continue
            first, second = (f"{name} script" if is_script else language_names.NAMES[name] for name, _ in known[:2])
            yield f"{known[1][1]:,} instructions are in {second} and {known[0][1]:,} in {first}", fix


def compute_effective_number(counts: Mapping[str, int]) -> float:
    """Return how many equally frequent kinds have the same entropy (Hill 1973): from 1 to the number of kinds."""
    total = sum(counts.values())
    return (
        math.exp(-sum(count / total * math.log(count / total) for count in counts.values() if count)) if total else 0.0
    )


def _describe_lengths(lengths: array[int]) -> dict[str, Any]:
    """Return quantiles and a histogram of lengths, whose bins end at 99% of the rows."""
    if not lengths:
        return {"quantiles": {}, "histogram": [], "sum": 0}
    values = np.frombuffer(lengths, np.dtype("l"))
    quantiles = np.quantile(values, QUANTILES, method="lower").tolist()
    last = max(int(np.quantile(values, 0.99)) + 1, 1)
    counts, edges = np.histogram(np.minimum(values, last), bins=min(_BINS, last), range=(0, last))
    bins = [[round(edge), int(count)] for edge, count in zip(edges, counts, strict=False)]
    names = [f"{share:g}" for share in QUANTILES]
    return {"quantiles": dict(zip(names, quantiles, strict=True)), "histogram": bins, "sum": int(values.sum())}


def _describe_counts(counts: Counter[str]) -> dict[str, Any]:
    """Return the most frequent kinds, their number, and their effective number."""
    shown = [{"name": name, "rows": count} for name, count in counts.most_common(_SHOWN)]
    return {"kinds": len(counts), "effective": round(compute_effective_number(counts), 3), "most": shown}
