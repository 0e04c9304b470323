"""The name that a mistyped one most likely means."""

from trl_sft.suggestions import LOOSE, STRICT, nearest_name


def test_nearest_name_is_the_most_similar_one():
    assert nearest_name("pakking", ["packing", "padding_free", "seed"], cutoff=STRICT) == "packing"


def test_nearest_names_are_joined_best_first():
    names = ["rows.csv", "rows.jsonl", "notes.txt"]
    assert nearest_name("rows.json", names, cutoff=LOOSE, limit=3) == "rows.jsonl or rows.csv"


def test_nothing_is_suggested_when_no_name_is_similar():
    assert nearest_name("qqqq", ["packing", "seed"], cutoff=LOOSE) == ""
    assert nearest_name("packing", [], cutoff=LOOSE) == ""


def test_strict_cutoff_leaves_out_a_name_that_the_loose_one_suggests():
    assert nearest_name("prompt", ["prompt_text"], cutoff=LOOSE) == "prompt_text"
    assert nearest_name("prompt", ["prompt_text"], cutoff=STRICT) == ""
