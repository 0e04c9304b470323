"""Rows with several right answers under a mapping, as SQuAD has them: the function that takes the first one.

Inputs: the columns of the rows, and the mapping. Outputs: the body of a function in Python. It is offered, never done:
that the first answer is to be trained is the choice of the user. Not here: the fault that shows it (`source_format`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trl_sft.data import column_names, formats


def write_function(columns: Sequence[str], *, nested: str, content: Mapping[str, Any]) -> str:
    """Return the body of the function that reads rows with several right answers, as SQuAD's; "" for other rows."""
    if not {"text", "answer_start"} <= set(content) or not isinstance(content["text"], list):
        return ""
    suggestion = column_names.suggest_format(["answer" if column == nested else column for column in columns])
    if suggestion is None or "answer" not in {*suggestion.rename, *formats.FORMATS[suggestion.format].columns}:
        return ""
    row_format = formats.FORMATS[suggestion.format]
    old_names = {new: old for old, new in suggestion.rename.items()}
    pairs = []
    for name in (*row_format.columns, *row_format.optional_columns):
        old = old_names.get(name, name)
        if old == "answer":
            pairs.append(f'"{name}": row["{nested}"]["text"][0]')
        elif old in columns:
            pairs.append(f'"{name}": row["{old}"]')
    return f'return {{{", ".join(pairs)}}} if row["{nested}"]["text"] else None'
