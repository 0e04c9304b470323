"""The kinds of faults, which programs compare by their codes: the list in `fault_codes.yaml`.

Inputs: that file. Outputs: for each code its meaning, its cause and what to do. Not here: faults (`errors`).
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import yaml

from trl_sft.errors import EXIT_USER_ERROR


class FaultKind(NamedTuple):
    """What a code stands for, in sentences."""

    meaning: str
    cause: str
    fix: str
    exit_code: int = EXIT_USER_ERROR


@functools.cache
def read_codes() -> dict[str, FaultKind]:
    """Return the kinds of faults by code, in the order of the list."""
    text = Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8")
    return {code: FaultKind(**entry) for code, entry in yaml.safe_load(text).items()}
