"""The form of answers: each rule on texts that have it and on texts that look so."""

import numpy as np
import pytest

from trl_sft.evaluation import answer_format, repetition, scripts
from trl_sft.evaluation.answer_pairs import AnswerPair
from trl_sft.evaluation.refusals import is_refusal

FENCE = "```"


def make_pair(base="", tuned="", *, prompt="Tell me more", reference="", ended=(None, None)):
    return AnswerPair("row 0", "", (("user", prompt),), base, tuned, reference, *ended)


def list_features(text):
    """Return the features that a text has as the tuned model's answer."""
    table = answer_format.measure([make_pair("plain text of the base", text, prompt="?")])
    return {share.name for share in table.shares if share.tuned}


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("Plain text, with 1. a number and - a dash.", set()),
        ("# Title\n\ntext", {"heading"}),
        ("#hashtag and C# code", set()),
        ("5 + 3 = 8\n#### 8", set()),
        ("## Step 1\n\ntext", {"heading"}),
        (f"{FENCE}python\n# a comment\n- no list\n- at all\n{FENCE}", {"code_fence"}),
        (f"{FENCE}python\nprint(1)\n", {"code_fence", "open_code_fence"}),
        (f"~~~\na\n~~~\n{FENCE}\nb\n{FENCE}", {"code_fence"}),
        ("- one\n- two", {"bullet_list"}),
        ("- one line alone", set()),
        ("• 苹果\n• 梨", {"bullet_list"}),
        ("1. one\n2) two", {"numbered_list"}),
        ("一、准备\n二、开始", {"numbered_list"}),
        ("（一）准备\n（二）开始", {"numbered_list"}),
        ("3.14 is pi\n2.71 is e", set()),
        ("In 2024.\n2025. came", set()),
        ("| a | b |\n|---|:-:|\n| 1 | 2 |", {"table"}),
        ("a | b\n--|--\n1 | 2", {"table"}),
        ("either | or\n-----\nnothing", set()),
        ("This is **bold** text", {"bold"}),
        ("这是**粗体**文字", {"bold"}),
        ("1、苹果\n2、梨", {"numbered_list"}),
        ("2**3 and 4**5", set()),
        ('{"a": [1, 2]}', {"json"}),
        (f'{FENCE}json\n{{"a": 1}}\n{FENCE}', {"json", "code_fence"}),
        ('{"a": 1,}', {"broken_json"}),
        ('{"a": "cut o', {"broken_json"}),
        ("[1, 2", {"broken_json"}),
        ("42", set()),
        ("The answer is {42}", set()),
        ("  \n", {"empty"}),
        ("no no no no no no no no", {"repeating"}),
        ("I'm sorry, but I can’t help with that.", {"refusal"}),
    ],
    ids=lambda value: value[:20] if isinstance(value, str) else None,
)
def test_features_of_a_text(text, features):
    assert list_features(text) == features


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "Sorry, I cannot assist with this request.",
        "As an AI language model, I do not have opinions.",
        "I won’t provide instructions for that.",
        "抱歉，我无法提供这类信息。",
        "对不起，我不能帮你做这件事。",
        "这个问题我不能回答。",
    ],
)
def test_refusals_are_recognised(text):
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sorry for the delay: the capital is Paris.",
        "You can't divide by zero.",
        "Unfortunately the train is late.",
        "I can help with that. First open the file.",
        "抱歉让你久等，答案是 4。",
        "不能除以零。",
        "word " * 60 + "I can't help with that.",  # long after the beginning
        "",
    ],
)
def test_helpful_answers_are_no_refusals(text):
    assert not is_refusal(text)


@pytest.mark.parametrize(
    ("text", "script"),
    [
        ("The quick brown fox", "latin"),
        ("今天天气很好", "han"),
        ("请用 Python 写一个函数", "han"),
        ("今日はいい天気です", "japanese"),
        ("오늘은 날씨가 좋다", "hangul"),
        ("Сегодня хорошая погода", "cyrillic"),
        ("abc", ""),
        ("x = 3", ""),
        (f"{FENCE}python\nprint('hello world')\n{FENCE}", ""),
        ("", ""),
        ("12345 ... !!!", ""),
    ],
)
def test_script_of_a_text(text, script):
    assert scripts.find_script(text) == script


def test_language_is_held_against_the_reference_and_else_against_the_prompt():
    chinese, english = "今天天气很好。", "The weather is fine."
    pairs = [
        make_pair(english, chinese, prompt=chinese),  # base wrong, tuned right
        make_pair(chinese, english, prompt=english, reference=chinese),  # a translation: base right, tuned wrong
        make_pair("4", chinese, prompt=english),  # of base nothing can be said
    ]
    (share,) = (share for share in answer_format.measure(pairs).shares if share.name == "other_language")
    assert (share.base, share.base_of, share.tuned, share.tuned_of) == (1, 2, 2, 3)
    assert (share.gained, share.lost) == (1, 1)


def test_answers_whose_end_is_not_known_do_not_count():
    ends = [(False, True), (False, None), (None, False), (True, False)]
    pairs = [make_pair("a", "b", ended=ended) for ended in ends]
    (share,) = (share for share in answer_format.measure(pairs).shares if share.name == "cut_off")
    assert (share.base, share.base_of, share.tuned, share.tuned_of) == (2, 3, 2, 3)
    assert (share.gained, share.lost) == (1, 1)
    assert share.describe()["base"] == pytest.approx(2 / 3)


def test_lengths_are_numpys_quantiles_and_chinese_counts_in_characters():
    texts = ["one two three", "四个汉字", "x", "", "a b c d e f g", "两字 two"]
    table = answer_format.measure([make_pair("", text) for text in texts])
    words = [3, 4, 1, 0, 7, 3]
    expected = np.quantile(words, answer_format.QUANTILES)
    assert table.lengths["tuned"]["words"] == pytest.approx(list(expected))
    assert table.lengths["base"]["words"] == [0] * 5
    assert table.lengths["tuned"]["characters"][-1] == 13


def test_repetition_and_distinct_words_are_those_of_their_definitions():
    assert repetition.measure_repetition("a b c d a b c d".split()) == pytest.approx(1 - 4 / 5)
    assert repetition.measure_repetition("a b c".split()) == 0.0
    table = answer_format.measure([make_pair("a a b", "a b c A"), make_pair("c", "x y")])
    # the tuned side has six words, the base four: a b c a are compared with a a b c
    assert table.numbers["distinct_1"] == {"base": pytest.approx(3 / 4), "tuned": pytest.approx(3 / 4)}
    assert table.numbers["distinct_2"] == {"base": pytest.approx(1.0), "tuned": pytest.approx(1.0)}


def test_diversity_of_longer_answers_is_not_lower_for_their_length():
    rng = np.random.default_rng(0)
    draw = lambda count: " ".join(f"w{n}" for n in rng.zipf(1.5, count) % 5000)  # noqa: E731
    table = answer_format.measure([make_pair(draw(40), draw(400)) for _ in range(50)])
    values = table.numbers["distinct_1"]
    assert values["tuned"] == pytest.approx(values["base"], rel=0.1)


def test_nothing_is_measured_without_answers():
    assert answer_format.measure([]) is None
    empty = answer_format.measure([make_pair("", "")])
    assert empty.numbers["distinct_1"] == {"base": None, "tuned": None}


@pytest.mark.parametrize("text", ["|" * 20_000, "*" * 20_000, "**a" * 7000, "# " * 10_000, "`" * 20_000, "(" * 20_000])
def test_odd_texts_take_no_time(text):
    import time

    began = time.monotonic()
    answer_format.measure([make_pair(text, text)])
    assert time.monotonic() - began < 2
