"""Numbers of options that are out of range, for the commands that have such options.

Inputs: the numbers by option, each with the least that it may be. Outputs: faults. Not here: numbers of a recipe.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from trl_sft.errors import Fault


def list_faults(numbers: Mapping[str, tuple[float | None, float]]) -> list[Fault]:
    """Return the faults of numbers that are not finite or too small.

    Args:
        numbers: option -> its number, None where the user wrote none, and the least that it may be.

    """
    return [
        Fault(option, f"{number} is out of range", f"Write a number from {least}.", code="run.bad_option")
        for option, (number, least) in numbers.items()
        if number is not None and not (math.isfinite(number) and number >= least)
    ]
