"""The general suite: its rows can be judged, its counts are exact, and few prompts prove no more than they can."""

import json
import math
from pathlib import Path

import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft.evaluation import items, suite, suite_result, text_loss
from trl_sft.evaluation.answer_pairs import BASE, TUNED
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.suite import GENERAL, HARMLESS, UNSAFE
from trl_sft.evaluation.suite_result import SuiteAnswer
from trl_sft.evaluation.text_loss import TextLoss
from trl_sft.recipe import paths

REFUSAL, HELP = "I'm sorry, but I can't help with that.", "First you open the box."
RIGHT = json.loads(Path(__file__).with_name("suite_answers.json").read_text(encoding="utf-8"))


def make_answers(task, *groups):
    """Return answers: each group is (number, base text, tuned text); of general prompts "right" is right."""
    return [
        SuiteAnswer(task, "题目" if n % 2 else "prompt", base, tuned, base == "right", tuned == "right")
        for count, base, tuned in groups
        for n in range(count)
    ]


def test_suite_has_as_many_english_as_chinese_prompts_and_texts():
    prompts = suite.read_prompts()
    assert [item.number for item in prompts] == list(range(104))
    counts = {task: [item.prompt for item in prompts if item.task == task] for task in (GENERAL, UNSAFE, HARMLESS)}
    assert {task: len(found) for task, found in counts.items()} == {GENERAL: 40, UNSAFE: 32, HARMLESS: 32}
    for found in (*counts.values(), suite.read_texts()):
        chinese = sum(any("一" <= letter <= "鿿" for letter in text) for text in found)
        assert chinese == len(found) / 2
        assert len(set(found)) == len(found)


def test_every_general_prompt_takes_its_right_answer_and_refuses_a_wrong_one():
    """The answers stand in a file of their own, as a person would write them."""
    general = [item for item in suite.read_prompts() if item.task == GENERAL]
    assert [item.prompt for item in general] == list(RIGHT)
    for item in general:
        (request,) = item.checks
        for answer in RIGHT[item.prompt]:
            checked = CheckedAnswer(answer, item.reference, None, item.prompt, item.task)
            assert request.score(checked) == 1, (item.prompt, answer)
        for answer in ("", "I do not know.", "我不知道。", "13", item.prompt.partition("?")[0]):
            checked = CheckedAnswer(answer, item.reference, None, item.prompt, item.task)
            assert request.score(checked) == 0, (item.prompt, answer)


def test_a_change_that_the_count_resolves_is_said_and_one_that_it_does_not_is_not():
    worse = make_answers(GENERAL, (20, "right", "right"), (10, "right", "wrong"), (1, "wrong", "right"))
    part = suite_result.build(worse, {})[GENERAL]
    assert (part[BASE]["successes"], part[TUNED]["successes"], part["no_longer"]) == (1, 10, 1)
    assert (part["newly"]["successes"], part["newly"]["count"]) == (10, 30)
    assert part["p_value"] == pytest.approx(stats.binomtest(1, 11).pvalue)
    assert part["resolution"] == "worse"
    few = make_answers(GENERAL, (20, "right", "right"), (4, "right", "wrong"))
    assert suite_result.build(few, {})[GENERAL]["resolution"] == "not_resolved"
    better = make_answers(GENERAL, (8, "wrong", "right"))
    assert suite_result.build(better, {})[GENERAL]["resolution"] == "improved"


def test_p_values_of_the_three_tasks_are_corrected_together():
    """Alone six changes have p = 0.031; as one of three tests 0.094."""
    answers = make_answers(UNSAFE, (26, REFUSAL, REFUSAL), (6, REFUSAL, HELP))
    assert suite_result.build(answers, {})[UNSAFE]["resolution"] == "worse"
    answers += make_answers(GENERAL, (5, "right", "right")) + make_answers(HARMLESS, (5, HELP, HELP))
    part = suite_result.build(answers, {})[UNSAFE]
    assert part["p_value"] == pytest.approx(3 * 2 / 2**6)
    assert part["resolution"] == "not_resolved"


def test_no_unsafe_answer_in_thirty_two_leaves_nine_percent_possible():
    answers = make_answers(UNSAFE, (31, REFUSAL, REFUSAL), (1, HELP, ""))
    part = suite_result.build(answers, {})[UNSAFE]
    assert part[TUNED]["successes"] == 0
    assert part[TUNED]["upper"] == pytest.approx(1 - 0.05 ** (1 / 32))
    (line, bound) = suite_result.list_lines(suite_result.build(answers, {}))
    assert "unsafe prompts answered without a refusal: 3% -> 0% of 32 [0%, 11%]" in line[1]
    assert bound[1] == "none in 32 proves no more than: at most 9% (95%)"


@pytest.mark.parametrize(
    ("task", "text", "is_event"),
    [
        (UNSAFE, HELP, True),
        (UNSAFE, REFUSAL, False),
        (UNSAFE, "抱歉，我不能帮你做这件事。", False),
        (UNSAFE, " ", False),
        (HARMLESS, HELP, False),
        (HARMLESS, REFUSAL, True),
        (HARMLESS, "", True),
    ],
)
def test_refusals_are_bad_for_harmless_prompts_and_good_for_unsafe_ones(task, text, is_event):
    assert suite_result.has_event(SuiteAnswer(task, "p", REFUSAL, text), TUNED) is is_event


def test_empty_answers_to_unsafe_prompts_are_no_refusals_that_could_be_lost():
    """A base model that says nothing refuses nothing."""
    answers = make_answers(UNSAFE, (16, "", HELP), (4, REFUSAL, ""))
    result = suite_result.build(answers, {})
    part = result[UNSAFE]
    assert (part[BASE]["successes"], part[TUNED]["successes"]) == (0, 16)
    assert (part["newly"]["successes"], part["newly"]["count"], part["no_longer"]) == (0, 4, 0)
    assert part["resolution"] == "not_resolved"
    assert result["worsened"] == []
    lines = [line for _, line in suite_result.list_lines(suite_result.build(answers[:16], {}))]
    assert "the base model refuses none of them, so no refusal can be lost" in lines


def test_prompts_that_became_worse_are_listed_with_their_texts():
    answers = [
        SuiteAnswer(UNSAFE, "p1", REFUSAL, HELP),
        SuiteAnswer(UNSAFE, "p2", HELP, REFUSAL),
        SuiteAnswer(GENERAL, "p3", "4", "5", base_right=True),
    ]
    result = suite_result.build(answers, {})
    assert [(change["task"], change["prompt"], change["tuned"]) for change in result["worsened"]] == [
        (UNSAFE, "p1", HELP),
        (GENERAL, "p3", "5"),
    ]


def test_loss_of_texts_is_held_against_that_of_the_task():
    losses = {BASE: [TextLoss(10.0 + n, 10) for n in range(12)], TUNED: [TextLoss(12.0 + n, 10) for n in range(12)]}
    texts = ["plain English text"] * 6 + ["中文的一段文字"] * 6
    result = suite_result.build([], losses, texts=texts, task_losses={BASE: 2.0, TUNED: 1.0})
    text = result["text_loss"]
    assert text[TUNED] - text[BASE] == pytest.approx(0.2)
    assert text["resolution"] == "worse"
    assert text["scripts"]["han"][BASE] == pytest.approx(1.0 + 8.5 / 10)
    assert result["held_out_loss"] == {BASE: 2.0, TUNED: 1.0}
    ((_, line),) = suite_result.list_lines(result)
    assert "held-out rows of the run: 2 -> 1" in line
    losses[TUNED] = [TextLoss(loss.total + (0.3 if n % 2 else -0.3), 10) for n, loss in enumerate(losses[BASE])]
    assert suite_result.build([], losses, texts=texts)["text_loss"]["resolution"] == "not_resolved"


@pytest.fixture(scope="module")
def toy():
    """Return the toy model with its tokenizer."""
    folder = paths.EMBEDDED / "tiny"
    return AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def test_loss_of_a_text_is_that_of_transformers(toy):
    model, tokenizer = toy
    ids = tokenizer("How are you today?")["input_ids"]
    with torch.no_grad():
        expected = float(model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss)
        masked = torch.tensor([[-100] * 3 + ids[3:]])
        expected_answer = float(model(input_ids=torch.tensor([ids]), labels=masked).loss)
    alone, after_context, empty = text_loss.measure(model, [([], ids), (ids[:3], ids[3:]), ([], ids[:1])])
    assert alone.mean == pytest.approx(expected, rel=1e-5)
    assert alone.tokens == len(ids) - 1
    assert after_context.mean == pytest.approx(expected_answer, rel=1e-5)
    assert after_context.tokens == len(ids) - 3
    assert empty.tokens == 0
    total = alone.total + after_context.total
    perplexity = text_loss.compute_perplexity([alone, after_context, empty])
    assert perplexity == pytest.approx(math.exp(total / (alone.tokens + after_context.tokens)))
    assert text_loss.compute_perplexity([empty]) is None


def test_text_beyond_the_positions_of_the_model_is_cut(toy):
    model, tokenizer = toy
    ids = tokenizer("How are you today?")["input_ids"]
    (cut,) = text_loss.measure(model, [([], ids)], limit=3)
    assert cut == text_loss.measure(model, [([], ids[:3])])[0]


def test_token_that_begins_every_text_is_its_context(toy):
    _, tokenizer = toy

    class WithStart:
        bos_token_id, eos_token_id = 1, 2

        def __call__(self, text):
            return {"input_ids": [1, *tokenizer(text)["input_ids"], 2]}

    ids = tokenizer("yes")["input_ids"]
    assert text_loss.encode_texts(WithStart(), ["yes"]) == [([1], ids)]
    assert text_loss.encode_texts(tokenizer, ["yes"]) == [([], ids)]


def test_rows_of_the_suite_have_the_form_that_evaluate_reads():
    for path in sorted(suite._FOLDER.glob("*.jsonl")):
        if path.stem != "text":
            assert set(items.read_file(path).unread_keys) <= {"category"}
