"""Rule checks of answers: text, numbers, JSON, overlap, instructions, code, and which of them fit references."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from trl_sft.errors import DataError, MissingPackage
from trl_sft.evaluation import eval_packages
from trl_sft.evaluation.checks import check_requests, code_tests, instructions, number_match, sandbox, text_match
from trl_sft.evaluation.checks.answer import CheckedAnswer


def score(check, answer, reference="", tmp_path=Path()):
    (request,) = check_requests.read_requests(check, folder=tmp_path, where="row 1")
    return request.score(CheckedAnswer(answer, reference))


@pytest.mark.parametrize(
    ("check", "answer", "reference", "expected"),
    [
        ("exact", " Paris\n", "Paris", 1),
        ("exact", "paris", "Paris", 0),
        ("normalised", "  the  answer: PARIS.", "The answer Paris", 1),
        ("normalised", "北京。", "北京", 1),
        ("normalised", "Ｐａｒｉｓ", "paris", 1),  # full width
        ("normalised", "-1", "1", 0),
        ("normalised", "1.5", "15", 0),
        ("normalised", "C++", "C", 0),
        ("normalised", "!", "?", 0),
        ("contains", "It is in Paris, France.", "paris", 1),
        ({"contains": ["red", "blue"]}, "blue and red", "", 1),
        ({"contains": ["red", "blue"]}, "blue", "", 0),
        ("regex:^Yes\\b", "Yes, it is", "", 1),
        ("regex:^Yes\\b", "Yesterday", "", 0),
        ("json", '{"a": [1, null]}', "", 1),
        ("json", '```json\n{"a": 1}\n```', "", 1),
        ("json", 'Here it is: {"a": 1}', "", 0),
        ("json", "NaN", "", 0),
        ("json", "[" * 100_000, "", 0),
        ("json_equal", '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', 1),
        ("json_equal", '{"a": true}', '{"a": 1}', 0),
        ("json_equal", "[1, 2]", "[2, 1]", 0),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', "", 1),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', "", 0),
        ({"json_schema": {"type": "object"}}, "no JSON", "", 0),
        ("chrf", "the same words", "the same words", 1),
        ("chrf", "", "the same words", 0),
        ("bleu", "the same four words", "the same four words", 1),
        ("bleu", "今天天气很好", "今天天气很好", 1),
        (["exact"], "a", "a", 1),
    ],
)
def test_check_scores_an_answer(check, answer, reference, expected):
    assert score(check, answer, reference) == pytest.approx(expected)


def test_bleu_counts_chinese_in_characters():
    """As words without spaces the answers would be one wrong word each, and BLEU 0."""
    assert 0.5 < score("bleu", "今天的天气非常好", "今天的天气非常坏") < 1


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 9 * 2 = $18.\n#### 18", 18),
        ("#### 1,234,567", 1234567),
        ("#### -3.50", Fraction(-7, 2)),
        ("#### 12\n#### 13 apples", 13),
        ("The total is $1,000.", 1000),
        ("16 - 3 - 4 = 9", 9),
        ("16-3", 3),
        ("x = -3", -3),
        ("(-3)", -3),
        ("it costs $-5", -5),
        ("Answer: \\boxed{42}, which is 7 more than 35", 42),
        ("\\boxed{\\frac{3}{4}}", Fraction(3, 4)),
        ("about 3/4", Fraction(3, 4)),
        ("3 / 0", None),
        ("1e3", 1000),
        ("5.", 5),
        (".5", Fraction(1, 2)),
        ("答案是１２。", 12),
        ("minus −7", -7),
        ("none", None),
        ("", None),
        ("1,2", 2),
        ("12,34,567 rupees", 1234567),
        ("9" * 5000, int("9" * 200)),
    ],
)
def test_final_number_of_a_text(text, number):
    assert number_match.find_final_number(text) == number


def test_numbers_of_very_large_exponents_take_no_time():
    assert number_match.find_final_number("1e999999999 and 2") == 2


def test_numeric_check_takes_reasoning_before_the_number():
    reference = "She has 3 + 4 = <<3+4=7>>7 eggs.\n#### 7"
    assert score("numeric", reference, reference) == 1
    assert score("numeric", "3 and 4 make 7 eggs", reference) == 1
    assert score("numeric", "3 and 4 make 8 eggs", reference) == 0
    assert score("numeric", "", reference) == 0


@pytest.mark.parametrize(
    ("text", "words"),
    [("Two words.", 2), ("don't stop", 2), ("今天天气 good", 5), ("3.14 and 2", 3), ("", 0), ("...", 0)],
)
def test_words_count_each_chinese_character(text, words):
    assert text_match.count_words(text) == words


@pytest.mark.parametrize(
    ("wanted", "followed", "not_followed"),
    [
        ({"max_words": 3}, "one two three", "one two three four"),
        ({"max_words": 4}, "今天很好", "今天很不好"),
        ({"min_words": 2}, "one two", "one"),
        ({"max_sentences": 1}, "One. ", "One. Two."),
        ({"min_sentences": 2}, "一。二。", "一二。"),
        ({"paragraphs": 2}, "a\n\nb", "a\nb"),
        ({"bullets": 2}, "- a\n- b", "- a"),
        ({"numbered": 2}, "1. a\n2) b", "1. a"),
        ({"headings": 1}, "# Title\ntext", "Title"),
        ({"include": ["red"]}, "Red wine", "hundred"),
        ({"exclude": "red"}, "hundred", "a red car"),
        ({"include": "天气"}, "今天天气好", "今天好"),
        ({"starts_with": "Dear"}, "Dear all", "Hello"),
        ({"ends_with": "Bye."}, "Well. Bye.", "Bye. Well"),
        ({"language": "zh"}, "今天好", "good day"),
        ({"language": "en"}, "good day", "今天好"),
        ({"json": True}, "{}", "text"),
        ({"lowercase": True}, "all low", "Not all"),
        ({"uppercase": True}, "ALL 1", "All"),
        ({"commas": False}, "no comma", "one, two"),
        ({"max_words": 3, "include": "a"}, "a b", "b c"),
    ],
)
def test_instruction_is_followed_or_not(wanted, followed, not_followed):
    assert score({"instructions": wanted}, followed) == 1
    assert score({"instructions": wanted}, not_followed) == 0
    assert score({"instructions": wanted}, " ") == 0


def test_every_instruction_has_a_type_of_value():
    assert instructions.INSTRUCTIONS.keys() == instructions._VALUE_TYPES.keys()


@pytest.mark.parametrize(
    ("references", "names"),
    [
        (["3+4=7\n#### 7", "#### -1,000"], ["numeric"]),
        (["7", "$1,000", "-3.5", "12%"], ["numeric", "exact"]),
        (["7", "seven"], ["normalised", "exact"]),
        (['{"a": 1}', "[1]"], ["json_equal", "json"]),
        (["Paris", "the blue whale"], ["normalised", "exact"]),
        (["word " * 30, "Paris"], ["chrf", "bleu"]),
        (["今天天气很好，我们一起去公园散步吧"], ["chrf", "bleu"]),
        ([], []),
    ],
)
def test_references_decide_which_checks_fit(references, names):
    assert [request.check.name for request in check_requests.choose_checks(references)] == names


@pytest.mark.parametrize(
    "check",
    [
        "exakt",
        "regex",
        "regex:(",
        {"regex": 3},
        "exact:3",
        {"instructions": {"max_word": 3}},
        {"instructions": {"max_words": "3"}},
        {"instructions": {"include": []}},
        {"instructions": {"language": "fr"}},
        {"instructions": {}},
        "instructions",
        "json_schema:missing.json",
        {"json_schema": {"type": "objekt"}},
        {"code": "print(1)"},
        "missing.py:score",
        "",
        3,
        None,
    ],
)
def test_check_that_cannot_be_used_is_refused_at_its_row(check, tmp_path):
    with pytest.raises(DataError) as refusal:
        check_requests.read_requests(check, folder=tmp_path, where="rows.jsonl:3")
    (fault,) = refusal.value.faults
    assert fault.where.startswith(("rows.jsonl:3", "regex", "the schema"))
    assert fault.fix


def test_misspelt_check_names_the_nearest_one():
    with pytest.raises(DataError, match="Did you mean `normalised`"):
        check_requests.read_requests("normalized", folder=Path(), where="--check")


def test_slow_pattern_is_a_fault(monkeypatch):
    monkeypatch.setattr(text_match, "_PATTERN_SECONDS", 0.05)
    with pytest.raises(DataError, match="repeats inside repeats"):
        score("regex:(a|aa)+$", "a" * 60 + "b")


def test_function_of_the_user_scores_and_its_faults_are_named(tmp_path):
    (tmp_path / "scores.py").write_text(
        "def polite(row):\n    return 'please' in row['answer']\n"
        "def wrong(row):\n    return 'yes'\n"
        "def broken(row):\n    return row['missing']\n",
        encoding="utf-8",
    )
    assert score("scores.py:polite", "please", tmp_path=tmp_path) == 1
    assert score("scores.py:polite", "now", tmp_path=tmp_path) == 0
    for name, problem in (("wrong", "returned 'yes'"), ("broken", "raised KeyError")):
        with pytest.raises(DataError, match=problem):
            score(f"scores.py:{name}", "x", tmp_path=tmp_path)


def test_schema_of_a_file(tmp_path):
    (tmp_path / "schema.json").write_text(json.dumps({"type": "array"}), encoding="utf-8")
    assert score("json_schema:schema.json", "[]", tmp_path=tmp_path) == 1


def test_missing_package_is_a_fault_with_the_line_for_pip():
    with pytest.raises(MissingPackage, match=r"pip install 'trl-sft\[eval\]'"):
        eval_packages.require_packages("the check chrf", "no_such_package")


def test_code_of_an_answer_runs_with_the_tests_of_its_row():
    answer = "Here:\n```python\ndef add(a, b):\n    return a + b\n```\nDone."
    assert code_tests.extract_code(answer) == "def add(a, b):\n    return a + b\n"
    assert score({"code": {"tests": "assert add(1, 2) == 3"}}, answer) == 1
    assert score({"code": {"tests": "assert add(1, 2) == 4"}}, answer) == 0
    assert score("code", "import sys; sys.exit(0)") == 0
    assert score("code", "") == 0


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("while True: pass", "more than 1 s"),
        ("x = bytearray(2 << 30)", "MemoryError"),
        ("open('big', 'wb').write(bytes(32 << 20))", "File too large"),
        ("import os; os._exit(0)", "before its last line"),
        ("def f(:", "SyntaxError"),
    ],
)
def test_code_is_ended_at_its_limits(code, reason):
    result = sandbox.run_code(code, seconds=1)
    assert not result.is_done
    assert reason in result.reason


def test_code_has_no_network_and_writes_only_to_its_folder_where_the_kernel_permits():
    """On a kernel without Landlock and user namespaces the measured limits say so; this machine has them."""
    limits = sandbox.measure_limits()
    assert limits["memory"]
    assert limits["time"]
    if not (limits["network"] and limits["files"]):
        pytest.skip(f"the kernel limits only some: {limits}")
    assert sandbox.run_code("open('own', 'w').write('x'); print(open('own').read())").output == "x"
