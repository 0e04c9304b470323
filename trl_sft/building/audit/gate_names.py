"""The names of the gates of an audit, in their order; imported by the command before anything heavy.

In: nothing. Out: names. Not here: the gates (`building.gates`).
"""

from __future__ import annotations

REMOVING = ("form", "empty", "length", "complete", "artefact", "language", "personal", "leakage", "duplicate")
NOTING = ("novelty", "conflict", "names")  # what they find is noted, and no row is removed
