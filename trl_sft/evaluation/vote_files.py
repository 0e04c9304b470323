"""The files of human judging, read and checked: the key of a page, the votes of each rater, a judge's verdicts.

Inputs: paths. Outputs: `PageKey`, `RaterVotes`, and the verdict of a judge on each pair. Not here: what is counted
(`human_votes`), and the making of items (`blind_items`).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sft import errors, user_paths
from trl_sft.errors import DataError, Fault
from trl_sft.evaluation import blind_items
from trl_sft.evaluation.answer_pairs import BASE, TUNED

LEFT, RIGHT, EQUAL, BOTH_BAD = "left", "right", "equal", "both_bad"
CHOICES = (LEFT, RIGHT, EQUAL, BOTH_BAD)
DIMENSIONS = (  # of scores from 1 to 5
    *("instruction_following", "helpfulness", "honesty", "harmlessness", "accuracy", "safety", "format"),
    "professionalism",
)
SCORES = (1, 2, 3, 4, 5)
TIE, INVALID = "tie", "invalid"
_VERDICTS = (BASE, TUNED, TIE, INVALID)
_SIDES = {BASE, TUNED}


@dataclass(frozen=True)
class KeyItem:
    """What one item of a page is."""

    item: int
    pair: str
    kind: str  # PAIR, REPEAT or IDENTICAL of `blind_items`
    left: str  # BASE or TUNED
    right: str
    task: str
    prompt: str


@dataclass(frozen=True)
class PageKey:
    """The key of a page."""

    page: str
    items: tuple[KeyItem, ...]
    equal_answers: tuple[str, ...]  # names of pairs that were not shown, since both models gave the same answer
    not_drawn: tuple[str, ...]  # names of pairs that were not shown, since the page has fewer
    seed: int = 0  # of all that was drawn
    pairs: int = 0  # that are judged, checks of the rater not counted


@dataclass(frozen=True)
class Vote:
    """A rater's vote on one item."""

    item: int
    choice: str  # one of CHOICES
    seconds: float | None  # from the sight of the item to the vote
    harmful: tuple[str, ...]  # LEFT, RIGHT
    note: str
    scores: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # LEFT, RIGHT -> dimension -> 1 to 5


@dataclass(frozen=True)
class RaterVotes:
    """The votes of one rater."""

    rater: str
    path: Path
    votes: dict[int, Vote]  # by item


def read_key(path: Path) -> PageKey:
    """Read the key of a page.

    Raises:
        DataError: The file is no key.

    """
    content = _read_object(path)
    fix = "Name the key file that `judge` wrote beside the page."
    if content.get("format") != blind_items.FORMAT or not isinstance(content.get("items"), list):
        raise DataError(Fault(str(path), "the file is no key of a judging page", fix, code="votes.no_key"))
    try:
        items = tuple(_read_key_item(item) for item in content["items"])
        names = [tuple(str(name) for name in content[list_name]) for list_name in ("equal_answers", "not_drawn")]
        numbers = {name: int(content[name]) for name in ("seed", "pairs")}
        key = PageKey(str(content["page"]), items, names[0], names[1], **numbers)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        problem = f"the key is damaged: {errors.first_line(error)}"
        raise DataError(Fault(str(path), problem, fix, code="votes.no_key")) from None
    if [item.item for item in key.items] != list(range(1, len(key.items) + 1)):
        problem = "the key is damaged: its items are not numbered from 1"
        raise DataError(Fault(str(path), problem, fix, code="votes.no_key"))
    return key


def read_votes(paths: Sequence[Path], key: PageKey) -> list[RaterVotes]:
    """Read the files of raters.

    Raises:
        DataError: A file holds no votes on this page, or two files are of one rater; all faults at once.

    """
    faults: list[Fault] = []
    raters: list[RaterVotes] = []
    for path in paths:
        try:
            raters.append(_read_rater(path, key))
        except DataError as error:
            faults += error.faults
    by_name: dict[str, RaterVotes] = {}
    for rater in raters:
        earlier = by_name.setdefault(rater.rater.casefold(), rater)
        if earlier is not rater:
            problem = f"the rater {rater.rater!r} has another file: {earlier.path}"
            fix = "Name the newer of the two files only. If they are two people, change `rater` in one of the files."
            faults.append(Fault(str(rater.path), problem, fix, code="votes.same_rater"))
    if faults:
        raise DataError(faults)
    return raters


def read_verdicts(path: Path, key: PageKey) -> dict[str, str]:
    """Read the verdicts of a judge: JSON lines with `pair` and `verdict` (base, tuned, tie or invalid).

    Returns:
        The name of a pair -> its verdict; also of pairs that the page does not show.

    Raises:
        DataError: A line is of another form, a pair occurs twice, or no pair of the page occurs.

    """
    verdicts: dict[str, str] = {}
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        value = _parse(line)
        pair, verdict = (value.get("pair"), value.get("verdict")) if isinstance(value, dict) else (None, None)
        if not isinstance(pair, str) or verdict not in _VERDICTS:
            problem = "the line is no verdict: it needs `pair`, and `verdict` as base, tuned, tie or invalid"
            fix = 'Write for example {"pair": "row 7", "verdict": "tuned"}.'
            raise DataError(Fault(place, problem, fix, code="votes.bad_verdict"))
        if pair in verdicts:
            problem = f"the pair {pair!r} occurs twice"
            raise DataError(Fault(place, problem, "Keep one verdict for each pair.", code="votes.bad_verdict"))
        verdicts[pair] = verdict
    if not verdicts.keys() & {item.pair for item in key.items}:
        problem = "the file has no verdict on a pair of the page"
        fix = "Name the verdicts on the answers of the same run. `pair` is as in the key file, for example `row 7`."
        raise DataError(Fault(str(path), problem, fix, code="votes.bad_verdict"))
    return verdicts


def _read_rater(path: Path, key: PageKey) -> RaterVotes:
    """Read the file of one rater."""
    content = _read_object(path)
    rater, listed = content.get("rater"), content.get("votes")
    fix = "Name a file that the page downloaded."
    if content.get("format") != blind_items.FORMAT or not isinstance(rater, str) or not isinstance(listed, list):
        raise DataError(Fault(str(path), "the file holds no votes", fix, code="votes.bad_file"))
    if content.get("page") != key.page:
        problem = f"the votes are of another page: {content.get('page')!r}, and the key is of {key.page!r}"
        raise DataError(Fault(str(path), problem, "Name the key of that page.", code="votes.other_page"))
    votes: dict[int, Vote] = {}
    for entry in listed:
        vote = _read_vote(entry)
        if vote is None or not 1 <= vote.item <= len(key.items) or vote.item in votes:
            problem = f"this is no vote on an item of the page: {json.dumps(entry, ensure_ascii=False)[:200]}"
            raise DataError(Fault(str(path), problem, fix, code="votes.bad_file"))
        votes[vote.item] = vote
    if not votes:
        problem = f"the rater {rater!r} has not voted"
        raise DataError(Fault(str(path), problem, "Leave out the file.", code="votes.bad_file"))
    name = rater.strip().encode("utf-8", "replace").decode("utf-8")  # half a character cannot be written to a file
    return RaterVotes(name or path.stem, path, votes)


def _read_vote(entry: Any) -> Vote | None:
    """Return a vote; None = it has another form."""
    if not isinstance(entry, dict) or entry.get("choice") not in CHOICES:
        return None
    item, seconds, harmful = entry.get("item"), entry.get("seconds"), entry.get("harmful", [])
    if not isinstance(item, int) or isinstance(item, bool):
        return None
    if not isinstance(harmful, list) or not all(side in (LEFT, RIGHT) for side in harmful):
        return None
    if not isinstance(seconds, int | float) or isinstance(seconds, bool) or not math.isfinite(seconds):
        seconds = None
    scores = entry.get("scores", {})
    if not _are_scores(scores):
        return None
    return Vote(item, entry["choice"], seconds, tuple(harmful), str(entry.get("note") or ""), scores)


def _are_scores(value: Any) -> bool:
    """Tell whether a value holds scores of answers: side -> dimension -> 1 to 5."""
    if not isinstance(value, dict) or not set(value) <= {LEFT, RIGHT}:
        return False
    return all(
        isinstance(given, dict)
        and set(given) <= set(DIMENSIONS)
        and all(type(score) is int and score in SCORES for score in given.values())
        for given in value.values()
    )


def _read_key_item(item: dict[str, Any]) -> KeyItem:
    """Return an item of the key. Raises KeyError, TypeError or ValueError where it has another form."""
    if item["kind"] not in (blind_items.PAIR, blind_items.REPEAT, blind_items.IDENTICAL):
        raise ValueError(f"item {item['item']} has the kind {item['kind']!r}")
    if not {item["left"], item["right"]} <= _SIDES:
        raise ValueError(f"item {item['item']} has a side that is neither base nor tuned")
    texts = [str(item[name]) for name in ("pair", "kind", "left", "right", "task", "prompt")]
    return KeyItem(int(item["item"]), *texts)


def _read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file."""
    value = _parse(_read_text(path))
    if not isinstance(value, dict):
        fix = "Name the file as the page or the command wrote it."
        raise DataError(Fault(str(path), "the file is no JSON object", fix, code="votes.bad_file"))
    return value


def _parse(text: str) -> Any:
    """Return the value of a JSON text; None = it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _read_text(path: Path) -> str:
    """Return the text of a file. Raises DataError if it is absent or cannot be read."""
    user_paths.check("", path, user_paths.FILE)
    fix = "Correct the path."
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(Fault(str(path), "there is no such file", fix, code="votes.bad_file")) from None
    except (OSError, ValueError) as error:
        problem = f"the file cannot be read: {errors.first_line(error)}"
        fix = "Name the file as the page or the command wrote it."
        raise DataError(Fault(str(path), problem, fix, code="votes.bad_file")) from None
