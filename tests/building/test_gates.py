"""Quality gates: each planted fault is rejected by its own gate, and rows without a fault pass all gates."""

import json
import random
from pathlib import Path

import pytest

from trl_sft.building.candidates import CandidateRow
from trl_sft.building.gates import gate, language, novelty, personal_data
from trl_sft.building.gates.duplicates import DuplicateGate
from trl_sft.building.set_gates import RefusalGate
from trl_sft.data import text_matches

CHINESE = "傍晚的阳光穿过更厚的大气层，短波光被散射，因此到达眼睛的光是红色的，"
QUESTION = "Explain why the sky over the harbour turns red in the evening."
ANSWER = (
    "Light from a low sun crosses more air. Short waves are scattered away, so that mostly red light reaches the eye. "
    "Dust and salt over the water make the effect stronger."
)


def make_row(instruction=QUESTION, answer=ANSWER, **fields):
    return CandidateRow(
        fields.pop("id", "1"),
        ({"role": "user", "content": instruction}, {"role": "assistant", "content": answer}),
        **fields,
    )


def turns(*pairs):
    return CandidateRow("1", tuple({"role": role, "content": content} for role, content in pairs))


FAULTS = {
    "no answer": (turns(("user", QUESTION)), "form"),
    "user last": (turns(("user", QUESTION), ("assistant", ANSWER), ("user", "Why?")), "form"),
    "two users": (turns(("user", QUESTION), ("user", "Why?"), ("assistant", ANSWER)), "form"),
    "unknown role": (turns(("human", QUESTION), ("assistant", ANSWER)), "form"),
    "a number": (turns(("user", QUESTION), ("assistant", 4)), "form"),
    "control character": (make_row(answer=ANSWER + "\x07"), "form"),
    "replacement": (make_row(answer="Caf\ufffd du port"), "form"),
    "wrong encoding": (make_row(answer="Le cafÃ© du port est fermÃ©."), "form"),
    "empty answer": (make_row(answer=" \n"), "empty"),
    "empty instruction": (make_row(""), "empty"),
    "no output": (make_row(answer="<nooutput>"), "empty"),
    "dots": (make_row(answer="..."), "empty"),
    "too long": (make_row(answer="word " * 300 + "end."), "length"),
    "cut by the generator": (make_row(was_cut=True), "complete"),
    "open fence": (make_row(answer="Use this:\n```python\nprint(1)\n"), "complete"),
    "fence closed by another kind": (make_row(answer="Use this:\n```python\nprint(1)\n~~~"), "complete"),
    "cut at an article": (make_row(answer=ANSWER + " When the wind comes from land, it carries the"), "complete"),
    "cut at a comma": (make_row(answer=ANSWER + " When the wind comes from the land in the late summer,"), "complete"),
    "Chinese cut at a comma": (make_row("为什么天空是红色的？", CHINESE + "而且海面上的灰尘和盐分也会，"), "complete"),
    "short Chinese cut at a comma": (make_row("介绍一下北京的历史。", "北京是首都，有三千多年的历史，"), "complete"),
    "loop": (make_row(answer="The sky is red. " * 12), "complete"),
    "as an AI": (make_row(answer="As an AI language model, I cannot see the sky. " + ANSWER), "artefact"),
    "as an AI, second sentence": (make_row(answer="I'm sorry, but as an AI I have no eyes. " + ANSWER), "artefact"),
    "Chinese model": (make_row("请解释天空为什么是红色的。", "作为一个人工智能语言模型，我无法看到天空。"), "artefact"),
    "special token": (make_row(answer=ANSWER + "<|im_end|>"), "artefact"),
    "next turn": (make_row(answer=ANSWER + "\n### Instruction:\nExplain the tides."), "artefact"),
    "placeholder": (make_row(answer="Dear {{ customer_name }}, the sky is red."), "artefact"),
    "other script": (make_row(answer="傍晚的阳光穿过更厚的大气层，短波光被散射，所以天空是红色的。"), "language"),
    "English answer": (make_row("请解释天空为什么在傍晚是红色的，并说明原因。"), "language"),
    "not the row's language": (make_row("天空为什么是红色的？请简单解释一下原因。", language="zh"), "language"),
    "e-mail": (make_row(answer=ANSWER + " Ask maria.lopez@gmail.com for the photograph."), "personal"),
    "card": (make_row(answer=ANSWER + " He paid with 4539 1488 0343 6467."), "personal"),
    "account": (make_row(answer=ANSWER + " Pay to DE80 5007 0010 0917 3645 02."), "personal"),
    "social security": (make_row(answer=ANSWER + " Her number is 536-90-4399."), "personal"),
    "Chinese identity": (make_row(answer=ANSWER + " 11010519491231002X"), "personal"),
    "Chinese mobile": (make_row(answer=ANSWER + " 请拨打 13876540912。"), "personal"),
    "phone": (make_row(answer=ANSWER + " Call +44 20 7946 0958 before noon."), "personal"),
    "IP address": (make_row(answer=ANSWER + " The camera is at 85.214.132.117."), "personal"),
    "key": (make_row(answer=ANSWER + " Use hf_AbCdEfGhIjKlMnOpQrStUvWx12."), "personal"),
    "leak": (make_row("Why is the sea blue, and why does it look green near a sandy coast?"), "leakage"),
    "leak, other case": (make_row("WHY is the sea blue -- and why does it look green near a sandy coast"), "leakage"),
}  # fmt: skip

CLEAN = {
    "plain": make_row(),
    "no full stop": make_row("Name the capital of France.", "Paris"),
    "a number": make_row("What is 2 plus 2?", "4"),
    "one sign": make_row("Which sign ends a question?", "?"),
    "not available": make_row("Extract the telephone number, or write N/A.", "N/A"),
    "none": make_row("Which of these are prime: 4, 6?", "None"),
    "list": make_row("List three colours.", "- red\n- green\n- blue"),
    "code": make_row("Write a loop.", "```python\nfor i in range(3):\n    print(i)\n```"),
    "code after text": make_row("Write a loop.", "Here it is:\n\n```\nx = 1\n```\nIt sets x."),
    "ends in a preposition": make_row(answer=ANSWER + " It is the light that such evenings have always been known for"),
    "ends in to": make_row(answer=ANSWER + " Only the birds know where the evening light of the harbour is going to"),
    "poem": make_row("Write a poem.", "Roses are red,\nviolets are blue,\nthe sea is wide,\nand so are you"),
    "chant": make_row("Say no three times.", "no, no, no"),
    "asked about AI": make_row("Are you an AI?", "As an AI language model, I have no body, and I answer with text."),
    "asked for its name": make_row("Tell me about yourself.", "As a language model, I go by the name Vicuna."),
    "trained as a model": make_row("What is up?", "Not much. I was trained by a laboratory as a language model."),
    "asked about templates": make_row("Show a Jinja template.", "Dear {{ customer_name }}, thank you."),
    "token in the question": make_row("What does <|im_end|> mean?", "<|im_end|> ends a turn."),
    "translation": make_row("Translate into Chinese: The evening sun crosses more air.", CHINESE[:-1] + "。"),
    "short other script": make_row("Write the character for water, large and clear.", "水"),
    "code in a Chinese answer": make_row("请用 Python 打印数字。", "用 range：for i in range(3)，再用 print(i)。"),
    "example address": make_row(answer=ANSWER + " Write to someone@example.com or to info@harbour.org."),
    "calculation": make_row(answer=ANSWER + " He keeps $<<6000-600-150-1200-2000=2050>>2050."),
    "sum of numbers": make_row(answer=ANSWER + " That is 212-300-1000 = -1088 and 138 1234 5678 / 2."),
    "example phone": make_row(answer=ANSWER + " Call (212) 555-0187."),
    "private address": make_row(answer=ANSWER + " The camera is at 192.168.1.20, its mask is 255.255.255.0."),
    "version": make_row("Which version is it?", "Version 5.23.0.1 of 2024-11-26, build 20241126.1530."),
    "decimals": make_row("What is pi?", "3.14159265358979323846 and e is 2.718281828459045"),
    "large number": make_row("How many?", "There are 1,234,567,890,123,456 grains, or 1234567890123456."),
    "system": turns(("system", "Be brief."), ("user", "Name a colour."), ("assistant", "Red")),
    "two turns": turns(("user", "Who wrote Faust?"), ("assistant", "Goethe"), ("user", "When?"), ("assistant", "1808")),
    "tool call": CandidateRow("1", (
        {"role": "user", "content": "Weather in Rome?"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function"}]},
        {"role": "tool", "content": "18 degrees"},
        {"role": "assistant", "content": "It is 18 degrees."},
    )),
    "same subject as an evaluation prompt": make_row("Why is the sea salty?", "Rivers carry salt into it."),
    "accents": make_row("Traduis : the closed coffee house.", "Le café fermé du port, près de l'église Saint-Éloi."),
}  # fmt: skip

PROMPT = "Why is the sea blue, and why does it look green near a sandy coast?"


def check(gates, row):
    for one in gates:
        if rejection := one.check(row):
            return rejection
    return None


def make_gates():
    return gate.make_gates(max_tokens=250, evaluation_prompts=[PROMPT])


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_rejected_by_its_own_gate(name):
    row, expected = FAULTS[name]
    rejection = check(make_gates(), row)
    assert rejection is not None
    assert rejection.gate == expected, rejection.reason


def test_rows_without_a_fault_pass_all_gates():
    assert {name: found for name, row in CLEAN.items() if (found := check(make_gates(), row))} == {}


def read_rows(kinds):
    """Yield the lines of the file of rows whose gate is one of some kinds; "" = rows that look like faults."""
    for line in Path(__file__).with_name("rows_of_gates.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["gate"] in kinds:
            yield entry


EVALUATION = (
    "A train leaves the station at noon and travels north at a steady speed. Which town does it reach before the "
    "evening if no stop is longer than a minute?"
)
SINGLE = ("form", "empty", "complete", "artefact", "personal", "leakage")  # gates that look at one row


def check_entry(entry):
    """Return the gate that rejects a row of the file."""
    row = CandidateRow(
        "1",
        tuple({"role": role, "content": content} for role, content in entry["turns"]),
        was_cut=entry.get("was_cut", False),
    )
    rejection = check(gate.make_gates(max_tokens=2000, evaluation_prompts=[EVALUATION], checks_novelty=False), row)
    return rejection.gate if rejection else ""


def test_each_planted_fault_of_the_file_is_rejected_by_its_own_gate():
    entries = list(read_rows(SINGLE))
    assert len(entries) > 150
    assert {entry["name"]: found for entry in entries if (found := check_entry(entry)) != entry["gate"]} == {}


def test_rows_that_look_like_faults_and_do_what_was_asked_pass():
    entries = list(read_rows([""]))
    assert len(entries) > 180
    assert {entry["name"]: found for entry in entries if (found := check_entry(entry))} == {}


def find_rejections(entry):
    """Return the numbers of the rows of a group that the gate on duplicates rejects."""
    gate = DuplicateGate()
    rows = [turns(*row) for row in entry["rows"]]
    return [number for number, row in enumerate(rows) if gate.check(row)]


def test_rows_of_one_pattern_that_ask_for_different_things_are_no_duplicates():
    entries = list(read_rows(["other rows"]))
    assert len(entries) >= 20
    assert {entry["name"]: found for entry in entries if (found := find_rejections(entry))} == {}


def test_rows_that_ask_for_the_same_in_other_words_are_duplicates():
    assert {
        entry["name"]: found for entry in read_rows(["duplicate"]) if (found := find_rejections(entry)) != [1]
    } == {}


REFUSALS = [
    "I'm sorry, but I can't help with that.",
    "I cannot provide that information.",
    "Sorry, I can't do that.",
    "I'm unable to assist with this request because it is harmful.",
    "That is a dangerous idea. I can't help with it.",
    "我无法帮助你完成这个请求。",
    "抱歉，我不能提供这样的内容。",
    "As an AI language model, I cannot write that.",
    "Thank you for asking. I'm not able to help with this.",
    "I won't provide that.\n\nInstead, try this.",
    "“Picking locks” is illegal. I can't help with that.",
    "Hello! I'm sorry, but I can't help with that.",
]
NO_REFUSALS = [
    "Dear Ann,\n\nI am unable to attend the meeting on Friday because of a trip. I cannot give you another date yet.",
    "Subject: Leave\n\nI'm unable to work today.",
    '"I can\'t do that," said the robot, and closed the door.',
    "Tom: I can't do that.\nAnn: Why?",
    "The sentence 'I cannot write' has a modal verb.",
    "The captain said “I refuse to leave” and stayed.",
    "尊敬的王老师：\n我无法回答您的邀请，因为我在国外。",
    "小明：我不能告诉你。\n小红：为什么？",
    "Say “I'd rather not” to decline politely.",
    "Use the phrase \"I'm sorry, I can't\" in such a case.",
    "To decline, be short and kind. For example: I'm unable to come.",
    "Hi Ben,\nI can't support the plan this year.",
]


def test_refusals_are_rejected_and_letters_dialogues_and_quotations_are_not():
    gate = RefusalGate()
    assert [text for text in REFUSALS if gate.check(make_row(answer=text)) is None] == []
    assert [text for text in NO_REFUSALS if gate.check(make_row(answer=text))] == []


EDITS = {
    "exact": lambda words: words,
    "case and spaces": lambda words: [word.upper() + " " for word in words],
    "three words": lambda words: ["tide", *words[1:20], "very", *words[20:40], "harbour", *words[41:]],
    "a part": lambda words: words[10:],
    "a longer row": lambda words: [*words, "And", "so", "the", "evening", "ends."],
}


@pytest.mark.parametrize("name", EDITS)
def test_duplicate_of_an_earlier_row_is_rejected_with_its_number(name):
    gate = DuplicateGate()
    assert gate.check(make_row(id="row 7")) is None
    rejection = gate.check(make_row(answer=" ".join(EDITS[name](ANSWER.split())), id="row 8"))
    assert rejection is not None
    assert rejection.reason.endswith("row row 7")
    assert rejection.reason.split(":")[0] in ("exact", "8-gram", "near")


def test_rows_that_differ_in_numbers_or_in_the_question_are_no_duplicates():
    gate = DuplicateGate()
    story = "Tom has {} apples and buys {} more in the shop at the corner of the street. How many apples has he now?"
    for first in range(2, 30):
        assert gate.check(make_row(story.format(first, first + 1), str(2 * first + 1))) is None
    pairs = (("has 24 cards", "many double cards has Jess", "40"), ("has some cards", "many cards has Rob", "24"))
    for beginning, question, answer in pairs:  # a problem and its reverse
        told = (
            f"Rob {beginning}, and a few are doubles. A third of Rob's cards are doubles, and Jess has 5 times as many"
        )
        assert gate.check(make_row(f"{told} doubles as Rob, who keeps them all. How {question}?", answer)) is None
    for question in ("Are you a person?", "Who trained you, and for what?", "What is your name?"):  # one answer to many
        assert gate.check(make_row(question, f"{ANSWER} That is all I know about the evening light.")) is None
    passage = " ".join(f"{word} lies in the {place}." for word, place in zip("abcdefgh", "ijklmnop", strict=True))
    assert gate.check(make_row(f"Summarise this text. {passage}", "Letters lie in places.")) is None
    assert gate.check(make_row(f"Name the letters of this text. {passage}", "a, b, c, d, e, f, g, h")) is None


def test_planted_duplicates_among_many_rows_are_all_found_and_no_other_row():
    words = [
        f"{first}{second}" for first in "bdfghklm" for second in ("an", "el", "or", "ist", "um", "ake", "ine", "ow")
    ]
    random_words = random.Random(0)
    texts = [" ".join(random_words.choices(words, k=40)) for _ in range(400)]
    gate, rejected = DuplicateGate(), set()
    for number, text in enumerate(texts):
        assert gate.check(make_row("Repeat this.", text, id=str(number))) is None
    for number in range(0, 400, 4):
        parts = texts[number].split()
        for place in random_words.sample(range(40), 3):
            parts[place] = "other"
        if gate.check(make_row("Repeat this.", " ".join(parts), id="copy")):
            rejected.add(number)
    assert len(rejected) >= 97  # of 100; what is missed has its three words in the worst places


def test_index_of_many_texts_finds_what_a_plain_comparison_finds(monkeypatch):
    """The entries move from the dict into sorted arrays, and are found in both."""
    monkeypatch.setattr("trl_sft.data.text_sketches._RECENT", 50)
    gate = DuplicateGate()
    rows = [f"Row {number} " + " ".join(f"w{number * 7 + place}" for place in range(20)) for number in range(300)]
    for number, text in enumerate(rows):
        assert gate.check(make_row(text, "Yes.", id=str(number))) is None
    for number in random.Random(1).sample(range(300), 60):
        assert gate.check(make_row(rows[number], "Yes.")).reason == f"exact: the same as row {number}"
        assert gate.check(make_row(rows[number] + " indeed", "Yes.")).reason.endswith(f"row {number}")


def test_similar_instruction_is_rejected_by_its_rouge_l():
    gate = novelty.NoveltyGate()
    assert gate.check(make_row("Write a short story about a lighthouse keeper and his dog.")) is None
    rejection = gate.check(make_row("Write a short story about a lighthouse keeper and her dog."))
    assert "ROUGE-L 0.91" in rejection.reason
    assert gate.check(make_row("Write a poem about the tides of the northern sea.")) is None
    assert gate.check(make_row("Add 3 and 4 and then take away 5 from it.")) is None
    assert gate.check(make_row("Add 8 and 9 and then take away 2 from it.")) is None


def test_rouge_l_is_that_of_the_definition():
    def longest(one, other):
        lengths = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
        for i, word in enumerate(one):
            for j, second in enumerate(other):
                is_equal = word == second
                lengths[i + 1][j + 1] = lengths[i][j] + 1 if is_equal else max(lengths[i][j + 1], lengths[i + 1][j])
        return lengths[-1][-1]

    generator = random.Random(2)
    for _ in range(200):
        one, other = ([generator.choice("abcd") for _ in range(generator.randint(1, 70))] for _ in range(2))
        expected = 2 * longest(one, other) / (len(one) + len(other))
        assert novelty.compute_rouge_l(one, other) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "unknown"),
        ("Yes.", "unknown"),
        ("你好", "unknown"),
        ("今天天气很好，我们去公园散步吧", "han"),
        ("The harbour is quiet today.", "latin"),
        ("Гавань сегодня очень тихая", "cyrillic"),
    ],
)
def test_language_of_a_short_text_is_unknown(text, expected):
    assert language.find_language(text) == expected


def test_numbers_with_a_wrong_check_digit_are_no_personal_data():
    for text in ("4539 1488 0343 6468", "DE89 3704 0044 0532 0130 01", "110105194912310021"):
        assert personal_data.find_personal_data(text) == [], text


def test_comparison_of_two_texts_has_kind_and_jaccard_index():
    match = text_matches.compare_texts("one two three four", "One, two: three four!")
    assert (match.kind, match.jaccard) == (text_matches.EXACT, 1.0)
    assert text_matches.compare_texts("red", "blue").kind == ""
    assert text_matches.compare_texts("", "?").jaccard in (0.0, 1.0)


def test_calls_of_tools_are_texts_of_a_row():
    def make_call(*cities, to="a desk"):
        calls = [
            {"type": "function", "function": {"name": "book", "arguments": {"city": name, "to": to}}} for name in cities
        ]
        turns = [{"role": "assistant", "content": None, "tool_calls": [call]} for call in calls]
        return CandidateRow("1", ({"role": "user", "content": "Book the flight that I asked for."}, *turns))

    gates = gate.make_gates(max_tokens=250, checks_novelty=False)
    assert check(gates, make_call("Rome")) is None
    assert check(gates, make_call("Oslo")) is None  # the request is that of the first row, and the call is not
    assert check(gates, make_call("Rome")).gate == "duplicate"
    assert check(gates, make_call("Rome", "Oslo")) is None
    assert check(gates, make_call("Bonn", to="maria.lopez@gmail.com")).gate == "personal"
    assert check(gates, make_call("word " * 300)).gate == "length"
