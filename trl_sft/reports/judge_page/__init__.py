"""The page on which people judge answers: one HTML file without any other, which sends nothing over a network.

Inputs: the items of `evaluation.blind_items`. Outputs: the text of the page. Its parts stand beside this file:
template, style sheet, script, and texts in English and Chinese. Its security policy lets the browser run this script
alone, and load nothing. Not here: which items there are, and the key to them, which is no part of the page.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft.evaluation import blind_items, vote_files
from trl_sft.reports import standalone_page


def format_page(items: Sequence[Mapping[str, Any]], page: str) -> str:
    """Return the page.

    Args:
        items: of `blind_items.build`.
        page: the name by which votes are matched with the key: `key["page"]`.

    """
    context = {"count": len(items), "dimensions": vote_files.DIMENSIONS, "scores": vote_files.SCORES}
    shown = [standalone_page.escape_texts(item, without_secrets=False) for item in items]
    data = {"page": page, "format": blind_items.FORMAT, "items": shown}
    return standalone_page.format_page(Path(__file__).parent, context, data)
