"""Texts that are equal or nearly equal are found, and texts that only share a subject are not."""

import itertools
import random

import pytest

from trl_sft.data import text_matches
from trl_sft.data.text_matches import EXACT, LEAKS, NEAR, NUMBERS, OVERLAP, PHRASE, ReferenceIndex, group_duplicates

_SYLLABLES = ["ba", "do", "ki", "lu", "me", "na", "po", "ri", "su", "ta", "ve", "zo"]
_WORDS = ["".join(parts) for parts in itertools.product(_SYLLABLES, repeat=3)]
_WORDING = (
    "Below is an instruction that describes a task. Write a response that completes the request.\n\n{}\n\nAnswer:"
)


def write_prompts(number, *, words=14, seed=0):
    """Return prompts of random words, of which no two share eight in a row."""
    draw = random.Random(seed)
    return [" ".join(draw.choices(_WORDS, k=words)).capitalize() + "?" for _ in range(number)]


def edit(text, number, seed=0):
    """Return a text with so many words replaced, at random places."""
    draw = random.Random(seed)
    words = text.split()
    for place in draw.sample(range(len(words)), number):
        words[place] = "edited"
    return " ".join(words)


def test_planted_leaks_when_others_share_nothing_are_all_found_and_only_these():
    prompts, others = write_prompts(60), write_prompts(200, seed=1)
    eight = " ".join(prompts[3].split()[2:10])
    planted = {
        EXACT: (prompts[0], 0),
        "case and space": ("  ".join(prompts[1].upper().split()) + " !", 1),
        NEAR: (edit(prompts[2], 3), 2),
        PHRASE: (f"Please explain {eight} to my old neighbour", 3),
        OVERLAP: (f"{others[0]} {prompts[4]} {others[1]}", 4),
    }
    index = ReferenceIndex(prompts, others)
    assert not list(index.find_all(others))
    matches = list(index.find_all([text for text, _ in planted.values()]))
    assert [(match.text, match.reference) for match in matches] == [(n, n) for n in range(5)]
    assert [match.kind for match in matches] == [EXACT, EXACT, NEAR, PHRASE, OVERLAP]
    assert [match.similarity for match in matches[:2]] == [1.0, 1.0]


@pytest.mark.parametrize("words", [12, 20, 60])
def test_three_edited_words_when_a_prompt_has_twelve_or_more_are_a_leak(words):
    prompts = write_prompts(80, words=words)
    index = ReferenceIndex(prompts)
    for number, prompt in enumerate(prompts):
        (match,) = index.find(edit(prompt, 3, seed=number))
        assert match.reference == number
        assert match.kind in LEAKS


def test_wording_when_all_prompts_have_it_is_not_compared():
    prompts, others = write_prompts(40), write_prompts(60, seed=1)
    worded, sample = [_WORDING.format(text) for text in prompts], [_WORDING.format(text) for text in others]
    index = ReferenceIndex(worded, sample)
    assert not list(index.find_all(sample))
    leak = _WORDING.format(edit(prompts[5], 3))
    assert [(match.reference, match.kind) for match in index.find(leak)] == [(5, NEAR)]
    few = ReferenceIndex(worded[:2], sample)  # two prompts do not show that it is wording; the sample does
    assert not list(few.find_all(sample))


def test_texts_that_differ_in_numbers_alone_are_no_leak():
    index = ReferenceIndex(["What is the sum of the numbers 12 and 30? Answer with one number."])
    (match,) = index.find("What is the sum of the numbers 13 and 31? Answer with one number.")
    assert match.kind == NUMBERS
    (match,) = index.find("What is the sum of the numbers 12 and 30? Reply with one number.")
    assert match.kind == NEAR


def test_short_texts_when_one_word_differs_are_compared_for_equality_alone():
    index = ReferenceIndex(["Name a red fruit."])
    assert not index.find("Name a blue fruit.")
    assert [match.kind for match in index.find("name a RED fruit")] == [EXACT]


def test_chinese_texts_are_compared_by_characters():
    index = ReferenceIndex(["请把下面这句话翻译成英文:我们明天早上一起去公园散步。"])
    (match,) = index.find("请把下面这句话翻译成英文:他们明天早上一起去公园跑步。")
    assert match.kind in LEAKS
    assert not index.find("写一首关于秋天的短诗,要求押韵并且不超过四行。")


def test_equal_references_are_all_named():
    prompts = write_prompts(3)
    index = ReferenceIndex([prompts[0], prompts[1], prompts[0].upper()])
    assert [match.reference for match in index.find(prompts[0])] == [0, 2]
    assert [match.reference for match in index.find(edit(prompts[0], 2))] == [0, 2]


def test_candidates_hold_every_pair_with_the_least_index():
    draw = random.Random(3)
    texts = [" ".join(draw.choices(_WORDS[:25], weights=range(1, 26), k=draw.randint(8, 24))) for _ in range(150)]
    index = ReferenceIndex(texts[:75])
    pairs = 0
    for text in texts[75:]:
        words = frozenset(text_matches.split_words(text))
        expected = {
            number
            for number, other in enumerate(texts[:75])
            if len(words & (parts := set(other.split()))) / len(words | parts) >= text_matches.LEAST_JACCARD
        }
        pairs += len(expected)
        assert expected <= index._list_candidates(words)
    assert pairs > 50


def test_duplicates_of_one_set_are_grouped_behind_the_first_of_them():
    prompts = write_prompts(6)
    texts = [prompts[0], prompts[1], prompts[0].upper(), edit(prompts[1], 3), prompts[2], edit(prompts[0], 2)]
    groups = group_duplicates(texts)
    assert [[(match.text, match.reference) for match in group] for group in groups] == [[(2, 0), (5, 0)], [(3, 1)]]
    assert groups[0][0].kind == EXACT
    assert {groups[0][1].kind, groups[1][0].kind} <= {NEAR, OVERLAP}
    assert group_duplicates(prompts) == []
