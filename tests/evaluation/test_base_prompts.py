"""The base model's own best prompt, and thoughts that are taken off answers."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from trl_sft.cli.evaluate import base_prompts
from trl_sft.cli.evaluate.base_prompts import BasePromptBuilder
from trl_sft.cli.evaluate.prompts import Example, choose_examples
from trl_sft.data.formats import CHAT, PAIRS
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.evaluation.thoughts import split_thought
from trl_sft.recipe import paths
from trl_sft.serving.prompts import RenderedPrompt

OWN = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
OWN += "{% if add_generation_prompt %}<assistant>{% endif %}"
EXAMPLES = [
    Example("sum", [{"role": "user", "content": "1+1?"}], {"role": "assistant", "content": "2"}),
    Example("sum", [{"role": "user", "content": "2+1?"}], {"role": "assistant", "content": "3"}),
    Example("word", [{"role": "user", "content": "red?"}], {"role": "assistant", "content": "rot"}),
]
ASKED = [EvaluationItem(0, None, "sum", [{"role": "user", "content": "2+2?"}], True, "4")]


@pytest.fixture(scope="module")
def tokenizers():
    """Return two tokenizers of the toy: one with the template of the run, one without."""
    loaded = [AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny") for _ in range(2)]
    loaded[1].chat_template = None
    return loaded


def build(tokenizers, base_template, *, row_type=CHAT, asked=ASKED, examples=EXAMPLES, **options):
    run, base = tokenizers
    base.chat_template = base_template
    rendered = [RenderedPrompt(item.prompt, [1, 2, 3]) for item in asked]
    renderer = SimpleNamespace(
        has_history=row_type == CHAT,
        render_worded=lambda content, tools: RenderedPrompt(content, run(str(content))["input_ids"]),
    )
    built = BasePromptBuilder(renderer, run, base).build(
        asked, rendered, examples=examples, number=options.get("number", 2), token_limit=options.get("token_limit")
    )
    return built, run.decode(built.ids[0])


def test_base_model_without_a_template_gets_plain_text(tokenizers):
    built, text = build(tokenizers, None)
    assert text.endswith("Question: 1+1?\nAnswer: 2\n\nQuestion: 2+1?\nAnswer: 3\n\nQuestion: 2+2?\nAnswer:") or (
        text.endswith("Question: 2+1?\nAnswer: 3\n\nQuestion: 1+1?\nAnswer: 2\n\nQuestion: 2+2?\nAnswer:")
    )
    assert "plain text" in built.template
    assert built.end_marks == ("\nQuestion:", "\n")
    assert built.examples == 2


def test_base_model_with_a_template_of_its_own_gets_that(tokenizers):
    built, text = build(tokenizers, OWN, number=1)
    assert built.template == "chat template of the base model"
    assert text.endswith("<user>2+2?<assistant>")
    assert built.end_marks == ()


def test_base_model_with_the_template_of_the_run_gets_it_with_turns(tokenizers):
    built, text = build(tokenizers, tokenizers[0].chat_template)
    assert built.template.startswith("chat template of the run")
    assert text.count("assistant") == 2


def test_worded_prompts_are_joined_and_end_before_the_next_one(tokenizers):
    examples = [Example("", f"### Instruction:\n{n}+1?\n\n### Response:\n", f"{n + 1}") for n in range(3)]
    asked = [EvaluationItem(0, None, "", "### Instruction:\n9+1?\n\n### Response:\n", True, "10")]
    built, text = build(tokenizers, None, row_type=PAIRS, asked=asked, examples=examples)
    assert text.count("### Response:") == 3
    assert built.end_marks == ("\n### Instruction:\n", "\n")


def test_examples_that_do_not_fit_are_left_out(tokenizers):
    whole = len(build(tokenizers, None)[0].ids[0])
    assert build(tokenizers, None, token_limit=whole - 1)[0].examples == 1
    assert build(tokenizers, None, token_limit=3)[0].ids == [[1, 2, 3]]


def test_examples_are_of_the_task_of_the_prompt_and_the_same_each_time():
    chosen = choose_examples(EXAMPLES, "sum", 2)
    assert {example.task for example in chosen} == {"sum"}
    assert chosen == choose_examples(EXAMPLES, "sum", 2)
    assert len(choose_examples(EXAMPLES, "word", 3)) == 3


@pytest.mark.parametrize(
    ("text", "marks", "expected"),
    [
        (" 4\nQuestion: 3+3?", ("\nQuestion:", "\n"), " 4"),
        ("\n4\nmore", ("\n",), "4"),
        ("line one\nline two\nQuestion: x", ("\nQuestion:",), "line one\nline two"),
        ("4", ("\n",), "4"),
    ],
)
def test_answer_of_a_base_model_ends_before_its_next_example(text, marks, expected):
    assert base_prompts.cut_at_marks(text, marks) == expected


@pytest.mark.parametrize(
    ("text", "is_open", "answer", "thought", "is_closed"),
    [
        ("<think>why</think>\n4", False, "4", "why", True),
        ("why</think>\n\n4", True, "4", "why", True),
        ("<think>\n\n</think>\n\n4", False, "4", "", True),
        ("<think>why and why", False, "", "why and why", False),
        ("why and why", True, "", "why and why", False),
        ("4", False, "4", "", True),
        ("the tag <think> opens it", False, "the tag <think> opens it", "", True),
        ("<think>a</think>b</think>c", False, "b</think>c", "a", True),
    ],
)
def test_thought_is_taken_off_by_one_rule(text, is_open, answer, thought, is_closed):
    assert split_thought(text, "<think>", "</think>", is_open=is_open) == (answer, thought, is_closed)
