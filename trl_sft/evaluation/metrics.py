"""Pure functions from a prediction and its reference to a number, each with its definition.

In: two texts. Out: a number between 0 and 1. Deliberately absent: models, files, averages.
"""

from __future__ import annotations

from collections.abc import Callable


def exact_match(prediction: str, reference: str) -> float:
    """Return 1 if both texts are equal apart from whitespace at their ends, else 0.

    Definition: https://huggingface.co/spaces/evaluate-metric/exact_match, with nothing ignored but those spaces.
    """
    return float(prediction.strip() == reference.strip())


METRICS: dict[str, Callable[[str, str], float]] = {"exact_match": exact_match}
