"""The chapters of the report on what people and a model that judges say, from what `votes --run` and `judge` wrote.

Inputs: what `eval.json` has under `evaluation.votes` and `evaluation.judge`. Outputs: texts and numbers as the template
shows them. Nothing is computed here, and a part of another form gives no chapter. Not here: what the numbers mean
(`evaluation.human_votes`, `evaluation.judging`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from trl_sft import console
from trl_sft.reports import chinese_evaluation

_MOST_NOTES = 50
_MAX_CHARACTERS = 1000  # of one note
_ODD_FORM = (KeyError, TypeError, ValueError, AttributeError)  # of a file that another version wrote
_UNCLEAR = "not_resolved"
_WINNERS = {"tuned": "improved", "base": "worse"}


def describe_votes(votes: Any) -> dict[str, Any] | None:
    """Return the chapter on the votes of people; None = there are none, or they have another form."""
    try:
        parts = [("part_all", "", votes["result"])]
        parts += [("part_task", str(name), part) for name, part in votes["tasks"].items()]
        return {
            "wins": [(kind, name, *_list_wins(part)) for kind, name, part in parts],
            "scores": list(_list_scores(votes["scores"])),
            "raters": [_list_rater(rater, votes["counted_raters"]) for rater in votes["raters"]],
            "agreement": [
                (f"{found['first']}, {found['second']}", f"{found['agreement']:.0%}", _describe_kappa(found))
                for found in votes["agreement"]
            ],
            "harmful": [str(votes["harmful"][side]) for side in ("base", "tuned")],
            "notes": [
                {name: _shorten(str(entry[name])) for name in ("rater", "pair", "note")}
                for entry in votes["notes"][:_MOST_NOTES]
            ],
        }
    except _ODD_FORM:
        return None


def describe_judge(judge: Any) -> dict[str, Any] | None:
    """Return the chapter on a model that judges, with its health; None = there is none, or it has another form."""
    try:
        audit, parts = judge["audit"], [("part_all", "", judge)]
        parts += [("part_task", str(name), part) for name, part in judge["tasks"].items()]
        return {
            "text": _shorten(str(judge["verdict"]["text"])),
            "text_zh": chinese_evaluation.translate_judge(judge),
            "model": _shorten(str(judge["judge"]["model"])),
            "wins": [(kind, name, *_list_judged(part)) for kind, name, part in parts],
            "scores": list(_list_scores(judge["dimensions"])),
            "health": [
                ("judge_audit", "-" if audit["skipped"] else f"{audit['passed_rows']:,} / {audit['rows']:,}"),
                ("judge_consistency", _describe_rate(judge["swap_consistency"])),
                ("judge_first", _describe_rate(judge["first_position_rate"])),
                ("judge_invalid", f"{judge['invalid']:,} / {judge['pairs']:,}"),
                ("judge_unjudged", f"{judge['not_judged']:,} / {judge['pairs']:,}"),
            ],
            "is_reliable": judge["reliability"]["is_reliable"],
            "is_partial": bool(judge["is_partial"]),
        }
    except _ODD_FORM:
        return None


def _list_wins(wins: Mapping[str, Any]) -> list[str]:
    """Return the cells of the votes on one task: won, tied, lost, win rate, p, and what they resolve."""
    counts = f"{wins['tuned']:,} / {wins['tie']:,} / {wins['base']:,}"
    return [counts, _describe_rate(wins["win_rate"]), f"{wins['p_value']:.2g}", _WINNERS.get(wins["winner"], _UNCLEAR)]


def _list_judged(part: Mapping[str, Any]) -> list[str]:
    """Return the cells of a judge's verdicts on one task, as `_list_wins` does, with the rate at equal length."""
    counts = f"{part['tuned']:,} / {part['tie']:,} / {part['base']:,}"
    controlled = part["length_controlled"]
    at_equal_length = _describe_rate(controlled["win_rate"] if controlled else None)
    rate, p_value = _describe_rate(part["win_rate"]), part.get("holm_p", part["sign_test_p"])
    return [counts, rate, at_equal_length, f"{p_value:.2g}", str(part["resolution"])]


def _list_scores(scores: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the cells of each dimension: base, tuned, difference, how many, p, and what they resolve."""
    for name, part in scores.items():
        if part["difference"] is None:
            continue
        found, count = part["difference"], part.get("pairs", part.get("rows"))
        means = [f"{part[side]:.2f}" for side in ("base", "tuned")]
        difference = f"{found['value']:+.2f} ({found['low']:+.2f} ... {found['high']:+.2f})"
        yield f"score_{name}", *means, difference, f"{count:,}", f"{part['holm_p']:.2g}", str(part["resolution"])


def _list_rater(rater: Mapping[str, Any], counted: list[str]) -> dict[str, Any]:
    """Return one rater: votes, repeated pairs contradicted, identical answers preferred, and whether they count."""
    return {
        "name": _shorten(str(rater["rater"])),
        "votes": f"{rater['votes']:,} / {rater['items']:,}",
        "contradictions": f"{rater['contradictions']:,} / {rater['repeats']:,}",
        "identical": f"{rater['identical_preferred']:,} / {rater['identical']:,}",
        "sides": f"{rater['left']:,} / {rater['right']:,}",
        "counts": rater["rater"] in counted,
    }


def _describe_rate(rate: Mapping[str, Any] | None) -> str:
    """Return a share with its interval; "-" where nothing counts for one."""
    if rate is None or rate["value"] is None:
        return "-"
    return f"{rate['value']:.0%} ({rate['low']:.0%} ... {rate['high']:.0%})"


def _describe_kappa(found: Mapping[str, Any]) -> str:
    if found["kappa"] is None:
        return "-"
    interval = "" if found["low"] is None else f" ({found['low']:.2f} ... {found['high']:.2f})"
    return f"{found['kappa']:.2f}{interval}"


def _shorten(text: str) -> str:
    """Return a text as a page shows it: escaped for a terminal, and not too long."""
    cut = text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ..."
    return console.escape_control_characters(cut)
