"""Every finding of an evaluation in one form: what became better or worse, by whom it was judged, and how sure that is.

Inputs: what `eval.json` has under `evaluation`: rule checks and tasks, the general suite, tasks of lm-eval, a judge's
verdicts, votes of people; what is absent is left out. Outputs: `EvaluationFinding`s, and the order in which they are
listed. Not here: the findings themselves, and what follows from all of them (`conclusion`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trl_sft.evaluation.statistics import BETTER, NO_DIFFERENCE, NOT_RESOLVED, WORSE, Interval, describe_interval

RULES, TASK, GENERAL_SUITE, TASK_SUITE = "rules", "task", "general_suite", "task_suite"  # sources
JUDGE, PEOPLE = "judge", "people"
DECIDES, CAN_HARM, DETAIL = "decides", "can_harm", "detail"  # whether a finding can change the verdict
SHARE, POINTS, SCORE, NATS = "share", "points", "score", "nats"  # units: of prompts or pairs; 1 to 5; a metric; a loss
TEXT_LOSS = "text_loss"
UNRELIABLE, LENGTH = "unreliable", "length"  # codes of a judge's verdict: the order, or the length, explains it
_NO_TASK = "(none)"  # rows without a task, beside rows with one
_UNITS = (SHARE, POINTS, SCORE, NATS)
_SUITE_TASKS = ("general", "unsafe", "harmless")


@dataclass(frozen=True)
class EvaluationFinding:
    """One finding.

    Attributes:
        source: RULES, TASK, GENERAL_SUITE, TASK_SUITE, JUDGE or PEOPLE.
        name: of the task, or of the dimension of a rubric; "" = the source as a whole.
        role: DECIDES; CAN_HARM = it can make a verdict worse and never better; DETAIL = it belongs to another one.
        resolution: BETTER, WORSE, NO_DIFFERENCE or NOT_RESOLVED.
        improvement: with its 95% interval; more is better in every source.
        unit: SHARE, POINTS, SCORE or NATS.
        count: prompts, pairs or paragraphs.

    """

    source: str
    name: str
    role: str
    resolution: str
    improvement: Interval
    unit: str
    count: int

    def describe(self) -> dict[str, Any]:
        """Return the finding as `eval.json` has it."""
        words = {name: getattr(self, name) for name in ("source", "name", "role", "resolution", "unit", "count")}
        return words | describe_interval(self.improvement)

    @classmethod
    def read(cls, described: Mapping[str, Any]) -> EvaluationFinding:
        """Return a finding from the form that `describe` gives it."""
        words = {name: str(described[name]) for name in ("source", "name", "role", "resolution", "unit")}
        return cls(**words, improvement=_read_interval(described), count=int(described["count"]))


def collect(evaluation: Mapping[str, Any]) -> list[EvaluationFinding]:
    """Return the findings of an evaluation, source by source."""
    return [
        *_read_rules(evaluation),
        *_read_suite(evaluation.get("suite") or {}),
        *_read_judge(evaluation.get("judge") or {}),
        *_read_task_suites(evaluation.get("lm_eval") or {}),
        *_read_votes(evaluation.get("votes") or {}),
    ]


def list_best(found: Sequence[EvaluationFinding]) -> list[EvaluationFinding]:
    """Return the parts that improved, by the lower end of their interval, the surest first."""
    best = [entry for entry in found if entry.name and entry.resolution == BETTER]
    return sorted(best, key=lambda entry: (_UNITS.index(entry.unit), -entry.improvement.low))


def list_attention(found: Sequence[EvaluationFinding]) -> list[EvaluationFinding]:
    """Return the parts that need attention, by the lower end of their interval: what became worse comes first.

    A task of the rows is among them unless it improved; a part of another source only if it became worse.
    """
    chosen = [
        entry
        for entry in found
        if entry.name and (entry.resolution == WORSE or (entry.source == TASK and entry.resolution != BETTER))
    ]
    return sorted(
        chosen, key=lambda entry: (entry.resolution != WORSE, _UNITS.index(entry.unit), entry.improvement.low)
    )


def describe_number(entry: EvaluationFinding, until: str = "to") -> str:
    """Return the improvement with its interval, in its unit; `until` stands between the ends of the interval."""
    value, low, high = entry.improvement
    if entry.unit == SHARE:
        return f"{value:+.1%} ({low:+.1%} {until} {high:+.1%})"
    return f"{value:+.3g} ({low:+.3g} {until} {high:+.3g})"


def _read_rules(evaluation: Mapping[str, Any]) -> Iterator[EvaluationFinding]:
    """Yield the rule checks as a whole, and each task of the rows."""
    parts = [(RULES, "", DECIDES, evaluation)]
    parts += [(TASK, str(name) or _NO_TASK, DETAIL, part) for name, part in evaluation["tasks"].items()]
    for source, name, role, part in parts:
        improvement = _read_interval(part["average_improvement"])
        yield EvaluationFinding(source, name, role, part["resolution"], improvement, SHARE, part["prompts"])


def _read_suite(suite: Mapping[str, Any]) -> Iterator[EvaluationFinding]:
    """Yield the tasks of the general suite and the loss of its texts, which can harm a verdict and never save one."""
    for name in _SUITE_TASKS:
        if part := suite.get(name):
            improvement = _read_interval(part["average_improvement"])
            yield EvaluationFinding(
                GENERAL_SUITE, name, CAN_HARM, part["resolution"], improvement, SHARE, part["prompts"]
            )
    text = suite.get(TEXT_LOSS)
    if text and text["difference"]:
        rise = _read_interval(text["difference"])
        improvement = Interval(-rise.value, -rise.high, -rise.low)
        yield EvaluationFinding(
            GENERAL_SUITE, TEXT_LOSS, DETAIL, text["resolution"], improvement, NATS, text["paragraphs"]
        )


def _read_task_suites(suites: Mapping[str, Any]) -> Iterator[EvaluationFinding]:
    """Yield the tasks of lm-eval, each by the metric that decides; a fall of a perplexity is an improvement."""
    for name, task in suites.get("tasks", {}).items():
        part = task["metrics"][task["metric"]]
        if part["difference"]["value"] is None:  # texts, of which only all together have a score
            continue
        improvement = _read_interval(part["difference"])
        if not part["higher_is_better"]:
            improvement = Interval(-improvement.value, -improvement.high, -improvement.low)
        unit = SHARE if 0 <= part["base"] <= 1 and 0 <= part["tuned"] <= 1 else SCORE
        yield EvaluationFinding(
            TASK_SUITE, str(name), DECIDES, task["resolution"], improvement, unit, part["observations"]
        )


def _read_judge(judge: Mapping[str, Any]) -> Iterator[EvaluationFinding]:
    """Yield what a model that judges prefers, as a whole and in each task, and its scores by dimension.

    A judge that changes its verdict with the order of the answers resolves nothing, and one that did not pass the audit
    decides nothing.
    """
    if not judge:
        return
    is_unreliable = judge["verdict"]["code"] == UNRELIABLE
    for name, role, part in [
        ("", DECIDES if judge["audit"]["has_passed"] else DETAIL, judge),
        *((str(name) or _NO_TASK, DETAIL, part) for name, part in judge["tasks"].items()),
    ]:
        if part["win_rate"] is not None:
            rate = _read_interval(part["win_rate"])
            improvement = Interval(*(value - 0.5 for value in rate))
            resolution = NOT_RESOLVED if is_unreliable else part["resolution"]
            yield EvaluationFinding(JUDGE, name, role, resolution, improvement, SHARE, part["prompts"])
    for name, part in judge["dimensions"].items():
        if part["difference"] is not None:
            resolution = NOT_RESOLVED if is_unreliable else part["resolution"]
            improvement = _read_interval(part["difference"])
            yield EvaluationFinding(JUDGE, name, DETAIL, resolution, improvement, POINTS, part["rows"])


def _read_votes(votes: Mapping[str, Any]) -> Iterator[EvaluationFinding]:
    """Yield what people prefer, as a whole and in each task, and their scores by dimension."""
    if not votes:
        return
    parts = [("", DECIDES, votes["result"]), *((name, DETAIL, part) for name, part in votes["tasks"].items())]
    words = {"tuned": BETTER, "base": WORSE, "not_resolved": NOT_RESOLVED}
    for name, role, wins in parts:
        rate, pairs = wins["win_rate"], wins["tuned"] + wins["base"] + wins["tie"]
        if rate["value"] is None:
            if pairs:
                yield EvaluationFinding(PEOPLE, name, role, NO_DIFFERENCE, Interval(0.0, 0.0, 0.0), SHARE, pairs)
            continue
        improvement = Interval(*(float(rate[key]) - 0.5 for key in ("value", "low", "high")))
        yield EvaluationFinding(PEOPLE, name, role, words[wins["winner"]], improvement, SHARE, pairs)
    for name, part in votes.get("scores", {}).items():
        improvement = _read_interval(part["difference"])
        yield EvaluationFinding(PEOPLE, name, DETAIL, part["resolution"], improvement, POINTS, part["pairs"])


def _read_interval(part: Mapping[str, Any]) -> Interval:
    return Interval(*(float(part[key]) for key in ("value", "low", "high")))
