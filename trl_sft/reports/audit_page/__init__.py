"""The page of an audit: one HTML file without any other, which sends nothing over a network.

Inputs: what `audit --json` answers, with the rows that have a finding. Outputs: the text of the page. Its parts stand
beside this file: template, style sheet, script, and texts in English and Chinese. Its security policy lets the browser
run this script alone, and load nothing. Not here: what is a fault (`building.gates`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trl_sft.reports import standalone_page


def format_page(content: Mapping[str, Any]) -> str:
    """Return the page.

    Args:
        content: `data`, `rows`, `clean`, `removed`, `gates`, `statistics`, `set_findings`, `findings` (each with gate,
            row, reason and turns) and `most_findings`.

    """
    data = {"findings": content["findings"], "gates": content["gates"]}
    data = standalone_page.escape_texts(data, without_secrets=True)
    return standalone_page.format_page(Path(__file__).parent, {"audit": content}, data)
