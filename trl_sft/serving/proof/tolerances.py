"""How far the exported weights may be from the trained ones, by the type of their numbers.

Inputs: a number type. Outputs: a `Tolerance`. The values were measured, and docs/explanation/proof-of-an-export.md has
the measurements. Not here: the comparison (`answer_comparison`).
"""

from __future__ import annotations

from typing import NamedTuple


class Tolerance(NamedTuple):
    """What the type of the numbers explains."""

    mean_kl: float  # nats, over all positions
    worst_kl: float  # nats, of one position
    gap: float  # nats: by how much the trained model may prefer its own token where a greedy answer differs


_TOLERANCES = {
    "float32": Tolerance(1e-7, 1e-6, 0.01),
    "float16": Tolerance(1e-4, 1e-3, 0.05),
    "bfloat16": Tolerance(2e-3, 0.1, 0.5),
    "q8_0": Tolerance(1e-2, 0.3, 1.0),
    "q5_1": Tolerance(0.1, 1.5, 2.0),
    "q5_0": Tolerance(0.1, 1.5, 2.0),
    "q4_1": Tolerance(0.3, 4.0, 4.0),
    "q4_0": Tolerance(0.3, 4.0, 4.0),
}
_NAMES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
_COARSE = _TOLERANCES["q4_0"]  # of other types
# llama.cpp computes with caches of 16 bits and quantizes activations, whatever the type of the weights is
LLAMA_CPP_FLOOR = Tolerance(1e-4, 1e-2, 0.1)
MOST_OF_CHANGE = 0.75  # an export further from the trained model is about as far from it as the base model is
SMALLEST_CHANGE = 1e-7  # nats: mean divergence of the base model that float32 can tell from none


def find(number_type: str, *, is_llama_cpp: bool) -> Tolerance:
    """Return the tolerance of a number type; llama.cpp, where it computes, has its own errors beside."""
    tolerance = _find(number_type)
    if not is_llama_cpp:
        return tolerance
    return Tolerance(*(max(values) for values in zip(tolerance, LLAMA_CPP_FLOOR, strict=True)))


def _find(number_type: str) -> Tolerance:
    """Return the tolerance of a number type, by the names of GGUF or torch."""
    name = number_type.lower()
    return _TOLERANCES.get(_NAMES.get(name, name), _COARSE)
