"""Texts that loop are recognised wherever the loop stands, and the quick looks hide none of them."""

import random

import pytest

from trl_sft.evaluation import repetition

_LETTERS = "abcdefghijklmnopqrstuvwxyz .,"


@pytest.mark.parametrize("period", [1, 2, 7, 11, 12, 13, 40, 119, 200])
def test_loop_of_half_of_a_text_is_found_wherever_it_stands(period):
    generator = random.Random(period)
    for place in (0.0, 0.3, 0.6, 1.0):
        loop = "".join(generator.choices(_LETTERS[:26], k=period)) * max(4, 120 // period)
        rest = "".join(generator.choices(_LETTERS, k=len(loop) - 4))
        text = rest[: int(place * len(rest))] + loop + rest[int(place * len(rest)) :]
        assert repetition.is_repeating(text), (place, text)


def test_text_without_a_loop_is_none():
    generator = random.Random(0)
    for size in (5, 60, 96, 97, 500, 5000):
        assert not repetition.is_repeating("".join(generator.choices(_LETTERS, k=size)))
