"""Templates for thoughts: how answers begin, what each setting trains, and loss without empty thoughts."""

import itertools
import json
import re

import pytest
import trl
from conftest import jsonl
from packaging.version import Version
from transformers import AutoTokenizer

from trl_sft import load_recipe
from trl_sft.recipe import paths
from trl_sft.tokenization import encode, template_variables, thinking
from trl_sft.training import stages, thinking_choices

IS_BEFORE_1_12 = Version(trl.__version__) < Version("1.12")
TEMPLATES = paths.list_templates()["qwen3"].parent
RECIPE = """\
model: {name_or_path: trl_sft:tiny}
tokenizer: {chat_template: ./own.jinja}
data: {train: r.jsonl}
train: {output_dir: out, max_steps: 1, per_device_train_batch_size: 2, max_length: 2048}
"""
PLAIN = {
    "messages": [
        {"role": "user", "content": "Say a."},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "Say b."},
        {"role": "assistant", "content": "b"},
    ]
}
SKIP = "data.loss_on=[assistant, without_empty_thoughts]"
NO_THINKING = "tokenizer.chat_template_kwargs={enable_thinking: false}"
# as Kimi-K2-Thinking: an empty thought before each answer, whatever the row has
WRITES_EMPTY_THOUGHTS = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}{{ '<think></think>' }}{% endif %}{{ m['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def thoughtful(*thoughts):
    row = json.loads(json.dumps(PLAIN))
    answers = [turn for turn in row["messages"] if turn["role"] == "assistant"]
    for turn, thought in zip(answers, thoughts, strict=True):
        turn["reasoning_content"] = thought
    return row


@pytest.fixture
def write(here):
    """Return a function that writes rows, a template (TRL's by its name, or a text) and a recipe."""

    def call(template, *rows):
        text = (TEMPLATES / f"{template}.jinja").read_text() if re.fullmatch(r"\w+", template) else template
        (here / "own.jinja").write_text(text, encoding="utf-8")
        (here / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
        jsonl(here / "r.jsonl", rows)

    return call


def trained(*overrides):
    """Return the trained tokens of each row as a list of texts, one for each run of tokens."""
    inputs = stages.prepare(load_recipe("recipe.yaml", overrides))
    return [spans_with_loss(row, inputs.chat.tokenizer) for row in inputs.datasets.train], inputs


def spans_with_loss(row, tokenizer):
    pairs = zip(row["input_ids"], row["labels"], strict=True)
    groups = itertools.groupby(pairs, lambda pair: pair[1] != encode.IGNORED)
    return [tokenizer.decode([token for token, _ in group]) for has_loss, group in groups if has_loss]


def try_choices(*overrides):
    trials = thinking_choices.try_choices(load_recipe("recipe.yaml", overrides), stages.read_first_rows)
    return {trial.choice.title if trial.choice else "": trial for trial in trials}


def test_answers_before_the_last_without_the_empty_thought_of_the_last_are_told(write, go):
    write("qwen3", PLAIN)
    code, out, err = go(None, command=["check"])
    assert code == 0, err
    assert "thoughts  answers with loss begin: 1 with an empty thought, 1 without a thought" in out
    assert "the model learns 2 beginnings for the same prompt; run `preview --compare`" in out
    assert "advice    with `tokenizer.chat_template: qwen3` answers begin: 2 with an empty thought" in out
    assert "with `tokenizer.chat_template_kwargs: {enable_thinking: false}`" not in out  # alone it is refused
    ledger = trained()[1].datasets.ledger
    assert ledger["train"]["answers"] == {
        "with_thought": 0,
        "with_empty_thought": 1,
        "after_empty_thought": 0,
        "without_thought": 1,
    }


def test_enable_thinking_is_not_advised_where_it_is_set(write, go):
    write("qwen3", PLAIN)
    code, _, err = go(None, NO_THINKING, command=["preview"])
    assert code == 2
    assert "set tokenizer.chat_template: qwen3" in err.lower()
    assert "enable_thinking: false" not in err.partition("->")[2]
    assert go(None, NO_THINKING, "tokenizer.chat_template=qwen3", command=["preview"])[0] == 0


def test_empty_thoughts_carry_no_loss_where_the_recipe_leaves_them_out(write):
    write("qwen3", PLAIN)
    assert trained()[0] == [["a<|im_end|>", "<think>\n\n</think>\n\nb<|im_end|>"]]
    rows, inputs = trained(SKIP)
    assert rows == [["a<|im_end|>", "b<|im_end|>"]]
    assert inputs.datasets.ledger["train"]["answers"]["after_empty_thought"] == 1
    assert inputs.datasets.ledger["train"]["prompt_mismatch"] == 0
    assert trained("data.loss_on=[without_empty_thoughts]")[0] == rows
    assert trained("data.loss_on=[last_turn, without_empty_thoughts]")[0] == [["b<|im_end|>"]]
    write("qwen3", thoughtful("so", ""), thoughtful("", "it goes"))
    assert trained(SKIP, "tokenizer.chat_template=qwen3")[0] == [
        ["<think>\nso\n</think>\n\na<|im_end|>", "b<|im_end|>"],
        ["a<|im_end|>", "<think>\nit goes\n</think>\n\nb<|im_end|>"],
    ]


@pytest.mark.parametrize("packing", ["false", "true"])
def test_a_stream_leaves_out_the_same_empty_thoughts(packing, write):
    write("qwen3", *[PLAIN] * 4)
    rows, _ = trained(SKIP, f"train.packing={packing}")
    (packed,) = {tuple(row) for row in rows}
    inputs = stages.prepare(
        load_recipe("recipe.yaml", [SKIP, "data.train={path: r.jsonl, streaming: true}", f"train.packing={packing}"])
    )
    streamed = spans_with_loss(next(iter(inputs.datasets.train)), inputs.chat.tokenizer)
    assert tuple(streamed) == packed


@pytest.mark.parametrize("words", ["[assistant, last_turn]", "[all, without_empty_thoughts]", "[answers]"])
def test_loss_on_takes_one_word_for_the_tokens(words, write, go):
    write("qwen3", PLAIN)
    code, _, err = go(None, f"data.loss_on={words}", command=["check", "--fast"])
    assert code == 2
    assert "data.loss_on" in err


def test_rows_that_are_no_chats_have_no_empty_thoughts_to_leave_out(here, go):
    text = RECIPE.replace("r.jsonl", "{path: rows.jsonl, wording: question_answer}")
    code, _, err = go(text.replace("tokenizer: {chat_template: ./own.jinja}\n", ""), SKIP, command=["check"])
    assert code == 2
    assert "data.loss_on" in err
    assert "Set `loss_on`" in err or "Remove without_empty_thoughts" in err
    skip = "data.loss_on=[without_empty_thoughts]"
    code, _, err = go(text.replace("tokenizer: {chat_template: ./own.jinja}\n", ""), skip, command=["check"])
    assert code == 2
    assert "-> Remove without_empty_thoughts, or set `wording: chat`." in err


@pytest.mark.skipif(
    IS_BEFORE_1_12 and not (TEMPLATES / "deepseek_r1_distill.jinja").exists(),
    reason=f"TRL {trl.__version__} has no deepseek_r1_distill.jinja",
)
def test_trls_training_template_is_named_where_the_own_one_cuts_thoughts(write, go):
    write("deepseek_r1_distill", thoughtful("so it goes", "and so on"))
    code, _, err = go(None, command=["check"])
    assert code == 2
    assert "Set tokenizer.chat_template: deepseek_r1_distill, which trains this row" in err
    code, out, err = go(None, "tokenizer.chat_template=deepseek_r1_distill", command=["check"])
    assert code == 0, err
    assert "answers with loss begin: 2 with a thought; the generation prompt is '<｜Assistant｜><think>\\n'" in out
    assert "beginnings" not in out


@pytest.mark.parametrize("name", ["qwen3_6", "qwen3_5_think"])
def test_each_setting_of_a_template_that_opens_a_thought_is_measured(name, write):
    write(name, PLAIN)
    trials = try_choices()
    assert "generation prompt" in trials[""].problem
    training = trials[f"tokenizer.chat_template: {name}"]
    assert not training.problem
    assert training.answers["with_empty_thought"] == 2
    assert training.generation_prompt == "<|im_start|>assistant\n<think>\n"
    switched = f"tokenizer.chat_template_kwargs: {{enable_thinking: false}} with tokenizer.chat_template: {name}"
    assert trials[switched].answers["without_thought"] == 2
    for trial in trials.values():  # what a trial says is what a run does
        overrides = trial.choice.overrides if trial.choice else []
        if not trial.problem:
            assert trained(*overrides)[1].datasets.ledger["train"]["answers"] == trial.answers


def test_one_thought_is_trained_where_the_template_writes_an_empty_one_before_it(write):
    write(WRITES_EMPTY_THOUGHTS, thoughtful("so it goes", "and so on"), PLAIN)
    rows, inputs = trained()
    assert sorted(rows, key=lambda row: len(row[0])) == [
        ["<think></think>a<|im_end|>", "<think></think>b<|im_end|>"],
        ["<think>\nso it goes\n</think>\n\na<|im_end|>", "<think>\nand so on\n</think>\n\nb<|im_end|>"],
    ]
    counts = inputs.datasets.ledger["train"]["answers"]
    assert (counts["with_thought"], counts["with_empty_thought"]) == (2, 2)


@pytest.mark.parametrize("name", ["chatml", "llama3", "gemma", "qwen2_5"])
def test_nothing_is_said_of_thoughts_where_the_template_has_none(name, write, go):
    write("qwen3", PLAIN)
    code, out, err = go(None, f"tokenizer.chat_template={name}", command=["check"])
    assert code == 0, err
    assert "thought" not in out
    assert try_choices(f"tokenizer.chat_template={name}") == {}


def test_the_variables_of_a_template_are_found_by_reading_and_rendering_it():
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    expected = {
        "qwen3": {"enable_thinking": (False,)},
        "qwen3_6": {"enable_thinking": (False,), "preserve_thinking": (True,)},
        "llama3": {},
        "qwen3_8": {
            "enable_thinking": (False,),
            "preserve_thinking": (False,),
            "reasoning_effort": ("medium", "low"),
        },
        "gptoss": {"reasoning_effort": ("low", "high")},
    }
    if IS_BEFORE_1_12 and not (TEMPLATES / "qwen3_8.jinja").exists():
        del expected["qwen3_8"]
    for name, switches in expected.items():
        tokenizer.chat_template = (TEMPLATES / f"{name}.jinja").read_text()
        assert thinking.find_switches(tokenizer, {}) == switches, name
    tokenizer.chat_template = (TEMPLATES / "qwen3.jinja").read_text()
    assert thinking.find_switches(tokenizer, {"enable_thinking": False}) == {"enable_thinking": (True,)}


@pytest.mark.parametrize(
    ("source", "switches"),
    [
        ("{% if thinking == 'on' %}a{% endif %}", {"thinking": ("on",)}),
        ("{% if 'off' != thinking | lower %}a{% endif %}", {"thinking": ("off",)}),
        ("{% if thinking_mode in ['fast', 'slow'] %}a{% endif %}", {"thinking_mode": ("fast", "slow")}),
        ("{{ {'none': 1, 'all': 2}[think_option] }}", {"think_option": ("none", "all")}),
        ("{% set e = reasoning_effort or 'max' %}{{ e }}", {"reasoning_effort": ("max", "low", "medium", "high")}),
        ("{% set e = reasoning_effort | default('low') %}{% if e == 'high' %}a{% endif %}",
         {"reasoning_effort": ("low", "high", "medium")}),
        ("{% if not reasoning_effort is defined %}{% set reasoning_effort = 'no' %}{% endif %}{{ reasoning_effort }}",
         {"reasoning_effort": ("no", "low", "medium", "high")}),
        ("{% if thinking_budget == 0 or thinking_budget < -1 %}a{% endif %}", {"thinking_budget": (-1, 0, 512)}),
        ("{% if thinking_budget > 1000 %}a{% endif %}", {"thinking_budget": (1000,)}),
        ("{% if enable_thinking is defined and not enable_thinking %}a{% endif %}", {"enable_thinking": (True, False)}),
        ("{% if enable_thinking == false %}a{% endif %}", {"enable_thinking": (True, False)}),
        ("{% generation %}{% if thinking %}a{% endif %}{% endgeneration %}", {"thinking": (True, False)}),
        ("{% set thinking = true %}{{ thinking }}{{ style == 'brief' }}", {}),
        ("{% for %}", {}),
    ],
)  # fmt: skip
def test_the_values_of_a_variable_are_those_that_the_template_compares_it_with(source, switches):
    assert dict(template_variables.list_switches(source)) == switches


# as Hunyuan's: a word opens a thought in the generation prompt, or closes it
OPENS_BY_WORD = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' and m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}
{%- elif m['role'] == 'assistant' and effort_of_thinking == 'none' %}{{ '<think></think>' }}{% endif %}
{{- m['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if effort_of_thinking == 'none' %}{{ '<think></think>' }}{% elif effort_of_thinking == 'deep' %}{{ '<think>' }}
{%- endif %}{% endif %}"""


# as gpt-oss': thoughts have a place of their own
OWN_PLACE = """\
{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' and m['reasoning_content'] %}{{ '[' + m['reasoning_content'] + ']' }}{% endif %}
{{- m['content'] + '<|im_end|>' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_thoughts_in_the_text_of_an_answer_get_the_form_of_the_template(write, here):
    in_text = thoughtful("", "")
    in_text["messages"][1]["content"] = "<think>\nso it goes\n</think>\n\na"
    in_text["messages"][3]["content"] = "<think></think>b <think>c</think>"  # no thought before the answer
    write(OWN_PLACE, in_text)
    assert trained()[0] == [["[so it goes]a<|im_end|>", "<think></think>b <think>c</think><|im_end|>"]]
    pair = {"question": "Say a.", "answer": "<think>so</think> a"}
    write(OWN_PLACE, pair)
    assert trained("data.train={path: r.jsonl, wording: chat}")[0] == [["[so]a<|im_end|>"]]
    write(WRITES_EMPTY_THOUGHTS, in_text | {"messages": in_text["messages"][:2]})
    assert trained()[0] == [["<think>\nso it goes\n</think>\n\na<|im_end|>"]]


def test_words_of_a_switch_are_tried_compared_and_named_in_the_fix(write, go):
    write(OPENS_BY_WORD, PLAIN)
    code, out, err = go(None, "--compare", command=["preview"])
    assert code == 0, err
    blocks = dict(zip(re.findall(r"══ (.*)", out), re.split(r"══ .*", out)[1:], strict=True))
    none = blocks["tokenizer.chat_template_kwargs: {effort_of_thinking: none}"]
    assert "assistant\n<think></think>⟦a⟧⟦<|im_end|>⟧" in none
    assert "refused: " in blocks["tokenizer.chat_template_kwargs: {effort_of_thinking: deep}"]
    code, _, err = go(None, "tokenizer.chat_template_kwargs={effort_of_thinking: deep}", command=["preview"])
    assert code == 2
    assert 'Set tokenizer.chat_template_kwargs: {effort_of_thinking: "none"}, which trains this row' in err


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*_training.jinja")))
def test_trls_training_templates_are_found_by_name(name):
    own = TEMPLATES / f"{name.removesuffix('_training')}.jinja"
    tokenizer = AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    tokenizer.chat_template = own.read_text()
    try:
        source = trl.chat_template_utils.get_training_chat_template(tokenizer)
    except Exception:
        source = None
    chat = type("Chat", (), {"tokenizer": tokenizer})
    assert thinking_choices.find_training_template(chat) == (name.removesuffix("_training") if source else "")


@pytest.mark.parametrize(
    ("text", "start", "beginning", "rest"),
    [
        ("P<think>\nso\n</think>\n\na", 1, thinking.THOUGHT, "<think>\nso\n</think>\n\na"),
        ("P<think>\n\n</think>\n\na", 1, thinking.EMPTY, "a"),
        ("P<think>\nso\n</think>\n\na", 9, thinking.THOUGHT, "so\n</think>\n\na"),
        ("P<think>\n\n</think>\n\na", 9, thinking.EMPTY, "a"),
        ("P<think></think>a", 16, thinking.NONE, "a"),
        ("Pa <think></think>", 1, thinking.NONE, "a <think></think>"),
        ("P<think>so", 1, thinking.THOUGHT, "<think>so"),
    ],
)
def test_the_beginning_of_an_answer_is_read_from_the_text(text, start, beginning, rest):
    marks = thinking.ThoughtMarks("<think>", "</think>", "P")
    assert marks.classify(text, start) == beginning
    assert text[marks.skip_empty(text, start) :].strip() == rest


def test_compare_shows_the_mask_of_each_setting(write, go, here):
    write("qwen3", PLAIN)
    code, out, err = go(None, "--compare", command=["preview"])
    assert code == 0, err
    blocks = dict(zip(re.findall(r"══ (.*)", out), re.split(r"══ .*", out)[1:], strict=True))
    as_is, template = blocks["the recipe as it is"], blocks["tokenizer.chat_template: qwen3"]
    assert "assistant\n⟦a⟧⟦<|im_end|>⟧" in as_is
    assert "assistant\n⟦<think>\n\n</think>\n\na⟧⟦<|im_end|>⟧" in template
    assert "refused: " in blocks["tokenizer.chat_template_kwargs: {enable_thinking: false}"]
    skipped = blocks["data.loss_on: [assistant, without_empty_thoughts]"]
    assert "<think>\n\n</think>\n\n⟦b⟧⟦<|im_end|>⟧" in skipped
    assert go(None, "--compare", "--html", "page.html", command=["preview"])[0] == 0
    page = (here / "page.html").read_text(encoding="utf-8")
    assert "<h2>tokenizer.chat_template: qwen3</h2>" in page
    assert "<script" not in page
    code, out, _ = go(None, "--compare", "tokenizer.chat_template=chatml", command=["preview"])
    assert code == 0
    assert "No setting of this template changes how answers begin" in out


def test_run_json_has_how_answers_begin(write, go, here):
    write("qwen3", PLAIN)
    code, _, err = go(None)
    assert code == 0, err
    measured = json.loads((here / "out" / "run.json").read_text())["measured"]
    assert measured["thinking"]["generation_prompt"] == "<|im_start|>assistant\n"
    assert measured["thinking"]["answers"]["with_empty_thought"] == 1
