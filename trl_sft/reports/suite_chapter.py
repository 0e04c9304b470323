"""The chapter of the report on the general suite, from what `evaluate --suite` wrote.

Inputs: what `eval.json` has under `evaluation.suite`. Outputs: texts and numbers as the template shows them. Nothing is
computed here, and a file of another form gives no chapter. Not here: what the numbers mean (`evaluation.suite_result`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl_sft import console

_SIDES = ("base", "tuned")
_TASKS = ("general", "unsafe", "harmless")
_MAX_CHARACTERS = 1000  # of one text


def describe(suite: Any) -> dict[str, Any] | None:
    """Return the chapter; None = the suite was not asked, or the file has another form."""
    try:
        return _describe(suite)
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _describe(suite: Mapping[str, Any]) -> dict[str, Any]:
    """Return the chapter. Raises KeyError, TypeError, ValueError or AttributeError for another form."""
    text, held_out = suite["text_loss"], suite["held_out_loss"]
    losses = []
    if text:
        losses.append(("suite_text_loss", *(f"{text[side]:.4g}" for side in _SIDES)))
    if all(held_out[side] is not None for side in _SIDES):
        losses.append(("suite_held_out_loss", *(f"{held_out[side]:.4g}" for side in _SIDES)))
    perplexities = suite.get("perplexity_under_base") or {}
    if all(perplexities.get(side) is not None for side in _SIDES):
        losses.append(("suite_perplexity", *(f"{perplexities[side]:.4g}" for side in _SIDES)))
    return {
        "tasks": [(f"suite_{task}", _list_cells(suite[task])) for task in _TASKS if task in suite],
        "losses": losses,
        "difference": _describe_difference(text) if text and text["difference"] else "",
        "worsened": [
            {key: _shorten(str(change[key])) for key in ("task", "prompt", *_SIDES)} for change in suite["worsened"]
        ],
        "worsened_count": int(suite["worsened_count"]),
    }


def _list_cells(part: Mapping[str, Any]) -> list[str]:
    """Return the numbers of one task: base, tuned, bound, newly, no longer, p, and what they resolve."""
    shares = [f"{part[side]['value']:.0%} ({part[side]['low']:.0%} ... {part[side]['high']:.0%})" for side in _SIDES]
    changes = [f"{part['tuned']['upper']:.0%}", str(part["newly"]["successes"]), str(part["no_longer"])]
    return [*shares, *changes, f"{part['p_value']:.2g}", str(part["resolution"])]


def _describe_difference(text: Mapping[str, Any]) -> str:
    found = text["difference"]
    return f"{found['value']:+.3g} ({found['low']:+.3g} ... {found['high']:+.3g})"


def _shorten(text: str) -> str:
    """Return a text as a page shows it: escaped for a terminal, and not too long."""
    rest = len(text) - _MAX_CHARACTERS
    cut = text if rest <= 0 else f"{text[:_MAX_CHARACTERS]} ... ({rest:,} more characters)"
    return console.escape_control_characters(cut)
