"""What a rater judges: pairs of answers in a drawn order, left and right drawn too, with checks of the rater.

Inputs: pairs of answers and a seed. Outputs: the items, as a page shows them, and the key, which says what each side of
an item is. Not here: the page (`reports.judge_page`), and the reading of votes (`human_votes`).
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trl_sft.evaluation.answer_pairs import BASE, TUNED, AnswerPair

PAIR, REPEAT, IDENTICAL = "pair", "repeat", "identical"  # what an item is
FORMAT = 1  # of the key and of a file with votes
_REPEAT_SHARE, _LEAST_REPEATS = 0.10, 3  # of the pairs
_IDENTICAL_SHARE, _LEAST_IDENTICAL = 0.05, 2


@dataclass(frozen=True)
class BlindItems:
    """The items of a page, and the key to them; `items[n]` and `key["items"][n]` are the same item."""

    items: list[dict[str, Any]]  # item (from 1), turns, left, right, reference
    key: dict[str, Any]  # as in the key file


@dataclass(frozen=True)
class _Item:
    """One item before it has a number."""

    pair: AnswerPair
    kind: str  # PAIR, REPEAT or IDENTICAL
    left: str  # BASE or TUNED
    right: str


def build(pairs: Sequence[AnswerPair], *, seed: int, max_pairs: int, shows_reference: bool = False) -> BlindItems:
    """Return the items of a page and their key.

    Pairs are drawn from each task in the task's share, so that they stand for all. Half of them have the tuned model's
    answer on the left. A tenth of them (at least three) is shown a second time with the sides exchanged, late after the
    first time; and for a twentieth as many prompts (at least two) both sides show the same answer. Pairs whose answers
    are equal are not asked about: they are a tie already.

    Args:
        pairs: the answers to each prompt.
        seed: of all that is drawn; the same seed and pairs give the same items.
        max_pairs: the most pairs that are judged, checks not counted.
        shows_reference: whether the rater sees the expected answer.

    """
    rng = random.Random(seed)
    different = [pair for pair in pairs if pair.base.strip() != pair.tuned.strip()]
    equal = [pair for pair in pairs if pair.base.strip() == pair.tuned.strip()]
    judged = _draw(rng, different, max_pairs)
    lefts = [TUNED] * (len(judged) // 2) + [BASE] * (len(judged) - len(judged) // 2)
    if rng.random() < 0.5:  # the odd one
        lefts = [_other(side) for side in lefts]
    rng.shuffle(lefts)
    items = [_Item(pair, PAIR, left, _other(left)) for pair, left in zip(judged, lefts, strict=True)]
    items = _insert_repeats(rng, items)
    items = _insert_identical(rng, items, [*_draw(rng, equal, len(equal)), *_draw(rng, judged, len(judged))])
    shown = [_show(number, item, shows_reference=shows_reference) for number, item in enumerate(items, 1)]
    page = hashlib.sha256(json.dumps(shown, ensure_ascii=True).encode()).hexdigest()[:16]
    key = {
        "format": FORMAT,
        "page": page,
        "seed": seed,
        "pairs": len(judged),
        "equal_answers": [pair.name for pair in equal],
        "not_drawn": sorted({pair.name for pair in different} - {pair.name for pair in judged}),
        "items": [_describe(number, item) for number, item in enumerate(items, 1)],
    }
    return BlindItems(shown, key)


def _draw(rng: random.Random, pairs: Sequence[AnswerPair], number: int) -> list[AnswerPair]:
    """Return at most `number` pairs in a drawn order, of each task its share (largest remainders)."""
    if len(pairs) <= number:
        return rng.sample(list(pairs), len(pairs))
    by_task: dict[str, list[AnswerPair]] = {}
    for pair in pairs:
        by_task.setdefault(pair.task, []).append(pair)
    shares = {task: number * len(members) / len(pairs) for task, members in by_task.items()}
    counts = {task: int(share) for task, share in shares.items()}
    by_remainder = sorted(by_task, key=lambda task: (counts[task] - shares[task], task))
    for task in by_remainder[: number - sum(counts.values())]:
        counts[task] += 1
    drawn = [pair for task in sorted(by_task) for pair in rng.sample(by_task[task], counts[task])]
    rng.shuffle(drawn)
    return drawn


def _insert_repeats(rng: random.Random, items: Sequence[_Item]) -> list[_Item]:
    """Return the items with some of the first half again in the last third, sides exchanged."""
    number = min(max(_LEAST_REPEATS, round(_REPEAT_SHARE * len(items))), len(items))
    originals = rng.sample(list(items[: max(number, len(items) // 2)]), number)
    repeats = [_Item(item.pair, REPEAT, item.right, item.left) for item in originals]
    start = max(len(items) - len(items) // 3, 1)
    result, tail = list(items[:start]), [*items[start:], *repeats]
    rng.shuffle(tail)
    if tail and result[-1].pair is tail[0].pair and len(tail) > 1:  # never twice in a row, where it can be avoided
        tail.append(tail.pop(0))
    return result + tail


def _insert_identical(rng: random.Random, items: list[_Item], candidates: Sequence[AnswerPair]) -> list[_Item]:
    """Return the items with some that show one answer on both sides; empty answers are not used."""
    number = max(_LEAST_IDENTICAL, round(_IDENTICAL_SHARE * len(items)))
    result = list(items)
    sides = [(pair, side) for pair in candidates for side in (rng.choice((BASE, TUNED)),) if pair.get_answer(side)]
    for pair, side in sides[:number]:
        result.insert(rng.randint(min(1, len(result)), len(result)), _Item(pair, IDENTICAL, side, side))
    return result


def _other(side: str) -> str:
    return BASE if side == TUNED else TUNED


def _show(number: int, item: _Item, *, shows_reference: bool) -> dict[str, Any]:
    """Return an item as the page has it: nothing in it says which model is where."""
    return {
        "item": number,
        "turns": [list(turn) for turn in item.pair.turns],
        "left": item.pair.get_answer(item.left),
        "right": item.pair.get_answer(item.right),
        "reference": item.pair.reference if shows_reference else "",
    }


def _describe(number: int, item: _Item) -> dict[str, Any]:
    """Return an item as the key has it."""
    return {
        "item": number,
        "pair": item.pair.name,
        "kind": item.kind,
        "left": item.left,
        "right": item.right,
        "task": item.pair.task,
        "prompt": item.pair.prompt,
    }
