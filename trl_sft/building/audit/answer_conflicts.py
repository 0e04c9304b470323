"""Rows whose prompt has other answers in other rows of the set.

In: an `AuditSource`. Out: such rows, each with what was found. Prompts and answers are compared apart from case,
spacing and punctuation, as the gate `conflict` does; here every row of such a prompt counts, since no comparison tells
which answer is wrong. Not here: what follows from it.
"""

from __future__ import annotations

from collections import Counter, defaultdict

from trl_sft.building.audit.audit_source import AuditSource
from trl_sft.data import mix


def find_conflicts(source: AuditSource) -> dict[int, str]:
    """Return each row whose prompt has different answers: its number -> how many rows give which share."""
    prompts: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for batch in source.iterate():
        for row, _ in batch:
            if row.instruction and row.answer:
                prompt = mix.hash_texts([str(turn.get("content") or "") for turn in row.messages[:-1]])
                prompts[prompt].append((int(row.id), mix.hash_texts([row.answer])))
    conflicts = {}
    for rows in prompts.values():
        counts = Counter(answer for _, answer in rows)
        if len(counts) > 1:
            for number, answer in rows:
                others = len(rows) - counts[answer]
                same = f"{counts[answer]:,} of {len(rows):,} rows of this prompt have this answer"
                conflicts[number] = f"{same}, {others:,} {'has another' if others == 1 else 'have others'}"
    return conflicts
