"""What people's votes tell: the tuned model's win rate, how far raters agree, and who failed the checks.

Inputs: the key of a page, the votes of raters, and the verdicts of a judge where there are any. Outputs: `VoteResult`,
as `votes` shows it. Ties are counted apart from wins. Not here: the reading of files (`vote_files`), and the making of
items (`blind_items`).
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

from trl_sft.evaluation import corrected_rate, rates, vote_scores
from trl_sft.evaluation import statistics as tests
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.blind_items import IDENTICAL, PAIR, REPEAT
from trl_sft.evaluation.corrected_rate import CorrectedRate
from trl_sft.evaluation.rates import Agreement, Rate
from trl_sft.evaluation.vote_files import BOTH_BAD, INVALID, LEFT, RIGHT, TIE, KeyItem, PageKey, RaterVotes, Vote

OUTCOMES = (TUNED, BASE, TIE)  # of a pair
_SIDE_ALPHA = 0.01  # of the test whether a rater prefers a side
_KAPPA_MARGIN = 0.1  # a judge is as good as people where its kappa is at most this much lower than theirs
_SCORES = {TUNED: 1.0, TIE: 0.5, BASE: 0.0}


@dataclass(frozen=True)
class WinCount:
    """Wins, losses and ties of the tuned model."""

    tuned: int
    base: int
    tie: int
    p_value: float  # of the exact sign test; of several tasks after Holm's correction

    @property
    def win_rate(self) -> Rate:
        """Return the tuned model's share of the pairs that one model won."""
        return rates.compute_rate(self.tuned, self.tuned + self.base)

    @property
    def winner(self) -> str:
        """Return TUNED or BASE where `p_value` is below 0.05, else "not_resolved"."""
        if self.p_value >= tests.ALPHA:
            return "not_resolved"
        return TUNED if self.tuned > self.base else BASE

    def describe(self) -> dict[str, Any]:
        """Return the counts as a mapping that JSON can write."""
        counts = {"tuned": self.tuned, "base": self.base, "tie": self.tie}
        return counts | {"win_rate": self.win_rate.describe(), "p_value": self.p_value, "winner": self.winner}


@dataclass(frozen=True)
class RaterResult:
    """One rater's votes, and how the rater did in the checks."""

    rater: str
    votes: int
    items: int  # of the page
    wins: WinCount
    both_bad: int  # of the ties
    left: int  # votes for the answer on the left, of pairs
    right: int
    identical: int  # identical answers that were judged
    identical_preferred: int  # of these: one was called better
    repeats: int  # pairs that were judged twice
    contradictions: int  # of these: each model won once
    median_seconds: float | None
    failed_checks: tuple[str, ...]  # sentences; () = none

    def describe(self) -> dict[str, Any]:
        """Return the result as a mapping that JSON can write."""
        names = ["rater", "votes", "items", "both_bad", "left", "right", "identical", "identical_preferred"]
        names += ["repeats", "contradictions", "median_seconds"]
        described = {name: getattr(self, name) for name in names}
        return described | {"failed_checks": list(self.failed_checks)} | self.wins.describe()


@dataclass(frozen=True)
class JudgeResult:
    """A judge's verdicts beside those of people, on pairs whose answers differ."""

    verdicts: int  # without invalid ones
    invalid: int
    wins: WinCount
    agreement: Agreement | None  # with the outcome of people; None = no pair has both
    trust: str  # "as_people", "indicative", or "unknown" = the raters have no kappa to compare with
    corrected: CorrectedRate | None  # None = too few pairs have both

    def describe(self) -> dict[str, Any]:
        """Return the result as a mapping that JSON can write."""
        described: dict[str, Any] = {"verdicts": self.verdicts, "invalid": self.invalid, **self.wins.describe()}
        described["agreement"] = self.agreement.describe() if self.agreement else None
        return described | {"trust": self.trust, "corrected": self.corrected.describe() if self.corrected else None}


@dataclass(frozen=True)
class VoteResult:
    """What all votes on a page tell."""

    raters: list[RaterResult]
    counted: list[str]  # the raters whose votes make the outcome
    agreements: list[tuple[str, str, Agreement]]
    outcomes: dict[str, str]  # pair -> TUNED, BASE or TIE
    wins: WinCount
    tasks: dict[str, WinCount]
    harmful: dict[str, int]  # BASE, TUNED -> pairs in which a counted rater called its answer harmful
    harm: dict[str, Any]  # of pairs in which one answer alone was called harmful
    scores: dict[str, Any]  # by dimension
    notes: list[dict[str, str]]  # of all raters
    judge: JudgeResult | None

    def describe(self) -> dict[str, Any]:
        """Return the result as a mapping that JSON can write."""
        agreements = [{"first": one, "second": two, **found.describe()} for one, two, found in self.agreements]
        return {
            "raters": [rater.describe() for rater in self.raters],
            "counted_raters": self.counted,
            "agreement": agreements,
            "result": self.wins.describe(),
            "tasks": {task: wins.describe() for task, wins in self.tasks.items()},
            "harmful": self.harmful,
            "harm": self.harm,
            "scores": self.scores,
            "notes": self.notes,
            "judge": self.judge.describe() if self.judge else None,
            "pairs": [{"pair": pair, "outcome": outcome} for pair, outcome in self.outcomes.items()],
        }


def count_votes(
    key: PageKey, raters: Sequence[RaterVotes], *, verdicts: Mapping[str, str] | None = None, counts_all: bool = False
) -> VoteResult:
    """Return what the votes tell.

    A pair is won by the model that more raters prefer; votes for both alike, and as many for each, are a tie. Each
    rater's first vote on a pair counts, the second one is a check.

    Args:
        key: of the page.
        raters: the votes of each rater.
        verdicts: of a judge, by pair.
        counts_all: whether raters who failed a check count too.

    """
    results = [_check_rater(key, rater) for rater in raters]
    is_counted = [counts_all or not result.failed_checks for result in results]
    counted = [rater for rater, counts in zip(raters, is_counted, strict=True) if counts]
    pairs = [item for item in key.items if item.kind == PAIR]
    choices = {rater.rater: _list_outcomes(pairs, rater) for rater in raters}
    outcomes = _combine(pairs, [choices[rater.rater] for rater in counted])
    agreements = []
    for one, two in combinations([rater.rater for rater in counted], 2):
        if found := _agree(choices[one], choices[two]):
            agreements.append((one, two, found))
    return VoteResult(
        raters=results,
        counted=[rater.rater for rater in counted],
        agreements=agreements,
        outcomes=outcomes,
        wins=_count_wins(list(outcomes.values())),
        tasks=_count_by_task(pairs, outcomes),
        harmful={side: _count_harmful(pairs, counted, side) for side in (BASE, TUNED)},
        harm=vote_scores.describe_harm(pairs, counted),
        scores=vote_scores.describe_scores(pairs, counted),
        notes=vote_scores.list_notes(key.items, raters),
        judge=None if verdicts is None else _judge(key, verdicts, outcomes, agreements=agreements),
    )


def _read_outcome(item: KeyItem, vote: Vote) -> str:
    """Return the side that a vote prefers, or TIE."""
    if vote.choice == LEFT:
        return item.left
    return item.right if vote.choice == RIGHT else TIE


def _list_outcomes(items: Sequence[KeyItem], rater: RaterVotes) -> dict[str, str]:
    """Return the outcome of each pair that a rater judged."""
    return {item.pair: _read_outcome(item, rater.votes[item.item]) for item in items if item.item in rater.votes}


def _combine(pairs: Sequence[KeyItem], choices: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Return the outcome of each pair over all raters, in the order of the page."""
    outcomes = {}
    for item in pairs:
        found = [choice[item.pair] for choice in choices if item.pair in choice]
        balance = found.count(TUNED) - found.count(BASE)
        if found and not balance:
            outcomes[item.pair] = TIE
        elif found:
            outcomes[item.pair] = TUNED if balance > 0 else BASE
    return outcomes


def _count_wins(outcomes: Sequence[str]) -> WinCount:
    tuned, base, tie = (outcomes.count(outcome) for outcome in OUTCOMES)
    return WinCount(tuned, base, tie, p_value=tests.compute_sign_test(tuned, base))


def _count_by_task(pairs: Sequence[KeyItem], outcomes: Mapping[str, str]) -> dict[str, WinCount]:
    """Return the wins of each task that has an outcome, by name; p-values are corrected for their number."""
    by_task: dict[str, list[str]] = {}
    for item in pairs:
        if item.task and item.pair in outcomes:
            by_task.setdefault(item.task, []).append(outcomes[item.pair])
    wins = {task: _count_wins(by_task[task]) for task in sorted(by_task)}
    p_values = tests.correct_p_values([count.p_value for count in wins.values()])
    return {task: replace(count, p_value=p) for (task, count), p in zip(wins.items(), p_values, strict=True)}


def _agree(first: Mapping[str, str], second: Mapping[str, str]) -> Agreement | None:
    """Return how far two raters agree on the pairs that both judged."""
    common = [pair for pair in first if pair in second]
    return rates.compute_agreement([first[pair] for pair in common], [second[pair] for pair in common], OUTCOMES)


def _count_harmful(items: Sequence[KeyItem], raters: Sequence[RaterVotes], side: str) -> int:
    """Return in how many pairs a rater called the answer of a side harmful."""
    count = 0
    for item in items:
        marks = [mark for rater in raters if item.item in rater.votes for mark in rater.votes[item.item].harmful]
        count += any((item.left if mark == LEFT else item.right) == side for mark in marks)
    return count


def _check_rater(key: PageKey, rater: RaterVotes) -> RaterResult:
    """Return one rater's counts, with the checks that failed."""
    voted = [(item, rater.votes[item.item]) for item in key.items if item.item in rater.votes]
    pairs = [item for item in key.items if item.kind == PAIR]
    first = _list_outcomes(pairs, rater)
    again = _list_outcomes([item for item in key.items if item.kind == REPEAT], rater)
    both = [pair for pair in again if pair in first]
    contradictions = sum({first[pair], again[pair]} == {TUNED, BASE} for pair in both)
    identical = [vote.choice for item, vote in voted if item.kind == IDENTICAL]
    preferred = sum(choice in (LEFT, RIGHT) for choice in identical)
    choices = [vote.choice for item, vote in voted if item.kind == PAIR]
    left, right = choices.count(LEFT), choices.count(RIGHT)
    seconds = [vote.seconds for _, vote in voted if vote.seconds is not None]
    failed = []
    if preferred and 2 * preferred >= len(identical):
        failed.append(f"called one of two identical answers better in {preferred} of {len(identical)} cases")
    if contradictions >= 2 and 2 * contradictions >= len(both):
        failed.append(f"contradicted the first vote in {contradictions} of {len(both)} repeated pairs")
    if tests.compute_sign_test(left, right) < _SIDE_ALPHA:
        failed.append(f"chose the left answer {left} times and the right one {right} times")
    return RaterResult(
        rater=rater.rater,
        votes=len(voted),
        items=len(key.items),
        wins=_count_wins(list(first.values())),
        both_bad=choices.count(BOTH_BAD),
        left=left,
        right=right,
        identical=len(identical),
        identical_preferred=preferred,
        repeats=len(both),
        contradictions=contradictions,
        median_seconds=statistics.median(seconds) if seconds else None,
        failed_checks=tuple(failed),
    )


def _judge(
    key: PageKey,
    verdicts: Mapping[str, str],
    outcomes: Mapping[str, str],
    *,
    agreements: Sequence[tuple[str, str, Agreement]],
) -> JudgeResult:
    """Return a judge's verdicts beside the outcomes of people."""
    names = [*(item.pair for item in key.items if item.kind == PAIR), *key.not_drawn]
    known = {pair: verdicts[pair] for pair in names if pair in verdicts}
    valid = {pair: verdict for pair, verdict in known.items() if verdict != INVALID}
    agreement = _agree(outcomes, valid)
    kappas = [found.kappa for _, _, found in agreements if found.kappa is not None]
    trust = "unknown"
    if agreement and agreement.kappa is not None and kappas:
        is_near = agreement.kappa >= statistics.mean(kappas) - _KAPPA_MARGIN
        trust = "as_people" if is_near else "indicative"
    labelled = [pair for pair in valid if pair in outcomes]
    return JudgeResult(
        verdicts=len(valid),
        invalid=len(known) - len(valid),
        wins=_count_wins(list(valid.values())),
        agreement=agreement,
        trust=trust,
        corrected=corrected_rate.correct(
            people=[_SCORES[outcomes[pair]] for pair in labelled],
            judge=[_SCORES[valid[pair]] for pair in labelled],
            judge_alone=[_SCORES[verdict] for pair, verdict in valid.items() if pair not in outcomes],
        ),
    )
