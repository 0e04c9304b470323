"""Where an answer ends, what a template drops, and what is advised: values for templates with one habit each."""

import json
import re

import models
import pytest
from conftest import jsonl
from template_shapes import SHAPES
from test_template_matrix import A1, A2, Q1, Q2, ROWS, TOOL, find_features, load_tokenizer, system, train

from trl_sft.data.bad_rows import BadRow
from trl_sft.recipe import paths
from trl_sft.tokenization import template_advice, turn_markers
from trl_sft.tokenization.template_advice import TrialChat

# shape -> tokens that end the last answer, header that is written whatever follows
MARKERS = {
    "plain": (("<|fin|>",), ""),
    "header_always_appended": (("<|eot|>",), "<|header|>assistant<|/header|>\n\n"),
    "header_always_appended_own_system_prompt": (("<|im_end|>",), "\n<|im_start|>assistant\n"),
    "header_of_the_user_follows_every_answer": (("<|im_end|>",), "\n<|im_start|>user\n"),
    "header_of_the_assistant_in_the_question": (("<|im_end|>",), ""),
    "header_of_the_user_ends_an_answer": (("<|usr|>",), ""),
    "ends_nothing_appends_header": ((), "<|bot|>"),
    "ends_nothing": ((), ""),
    "two_end_tokens": (("<|end|>", "</s>"), ""),
    "text_begins_with_the_end_token": (("</s>",), ""),
    "words_end_an_answer": ((), ""),
}


@pytest.mark.parametrize("name", MARKERS)
def test_end_of_an_answer_is_told_from_the_next_header(name):
    markers = turn_markers.find_turn_markers(load_tokenizer(name), {})
    assert (markers.end_tokens, markers.appended_header) == MARKERS[name]
    assert not set(markers.end_tokens) & markers.header_tokens


def test_header_is_no_stop_token():
    assert turn_markers.find_stop_token(load_tokenizer("ends_nothing_appends_header"), {}) == ""
    assert turn_markers.find_stop_token(load_tokenizer("header_always_appended"), {}) == "<|eot|>"
    assert turn_markers.find_stop_token(load_tokenizer("two_end_tokens"), {}) == "<|end|>"


def trained(name, kind, accepted=False):
    messages, tools = ROWS[kind]
    return train(name, {"messages": messages, "tools": tools}, accepted)[2]


def test_answers_of_a_template_that_always_appends_the_header_end_before_it():
    spans = trained("header_always_appended", "three answers")
    assert spans == tuple(f"anb{n} It is fine and good. anz{n}<|eot|>" for n in (1, 2, 3))


@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("name", ["drops_the_system_prompt", "drops_the_system_prompt_after_an_answer"])
def test_system_prompt_that_a_template_drops_is_told_and_no_acceptance_trains_the_user(name, accepted):
    refused = trained(name, "system prompt and three answers", accepted)
    assert isinstance(refused, BadRow)
    assert refused.problem == "the chat template drops the system prompt: 'syb Be brief. syz'"
    assert "run.allow" not in refused.fix
    assert trained(name, "three answers")[0] == "anb1 It is fine and good. anz1<|fin|>"


def test_turn_that_a_template_drops_is_told():
    refused = trained("drops_earlier_questions", "three answers", accepted=True)
    assert "the chat template drops a turn of the user: 'uab1" in refused.problem


def test_answer_of_a_tool_that_a_template_drops_from_history_becomes_a_turn_of_the_user():
    spans = trained("drops_tool_answers_in_history", "call")
    assert spans == ('<call>getweather {"city": "clb1"}</call><|fin|>', "anb2 It is fine and good. anz2<|fin|>")


def test_difference_of_spaces_before_the_header_is_refused_or_accepted_with_the_answer_alone():
    name = "newline_after_a_tool_that_a_turn_follows"
    assert "run.allow: [prompt_mismatch]" in trained(name, "call").fix
    spans = trained(name, "call", accepted=True)
    assert spans == ('<call>getweather {"city": "clb1"}</call><|fin|>', "anb2 It is fine and good. anz2<|fin|>")


@pytest.mark.parametrize("name", ["arguments_as_json_text", "arguments_printed"])
def test_arguments_are_json_text_where_the_template_takes_that_alone(name):
    assert "json_arguments" in find_features(name).template_features
    for kind in ("call", "call with content null"):
        assert '{"city": "clb1"}' in trained(name, kind)[0]
        assert "tool_call>" not in trained(name, kind)[0]


def test_arguments_stay_a_mapping_where_the_template_takes_one():
    assert "json_arguments" not in find_features("arguments_one_by_one").template_features
    assert trained("arguments_one_by_one", "call")[0] == "<call>getweather<city>clb1</city></call><|fin|>"


def test_call_is_trained_with_its_end_where_thoughts_are_stripped_from_history():
    if "qwen3" not in paths.list_templates():
        pytest.skip("the installed TRL has no template of Qwen3")
    call = '<tool_call>\n{"name": "getweather", "arguments": {"city": "clb1"}}\n</tool_call><|im_end|>'
    for kind in ("call", "call with content null"):
        first, last = trained("qwen3", kind)
        assert first == call
        assert last.endswith("anb2 It is fine and good. anz2<|im_end|>")


def test_call_without_an_end_is_refused():
    assert trained("calls_have_no_end", "call").code == "template.no_end_token"


def test_call_that_loses_its_name_is_refused():
    assert "drops a part of an answer: 'getweather'" in trained("identifiers_for_names_of_calls", "call").problem


def test_thought_is_no_text_where_the_template_writes_an_empty_one_before_answers():
    """Kimi-K2's renders thoughts before calls alone: a final answer would begin with two thoughts."""
    name = "thoughts_before_calls_alone"
    assert "reasoning_content" in find_features(name).template_features
    assert trained(name, "thought in the last answer").code == "template.drops_content"
    assert trained(name, "one answer") == ("<think></think>anb1 It is fine and good. anz1<|fin|>",)


# as Gemma 4's does: without the keyword the prompt has an empty thought, which the text has not
THINKS = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|fin|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% if not enable_thinking %}<think></think>{% endif %}{% endif %}"
)


def test_keyword_is_advised_only_where_a_trial_shows_that_it_helps():
    tokenizer = models.tokenizer(paths.EMBEDDED / "tiny")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|fin|>"]})
    tokenizer.chat_template = THINKS
    chat = TrialChat([Q1, A1, Q2, A2], [1, 3])
    find = template_advice.find_keyword
    assert find(tokenizer, {}, chat, train=template_advice.place_loss) == {"enable_thinking": True}
    wrong = {"enable_thinking": False}
    assert find(tokenizer, wrong, chat, train=template_advice.place_loss) == {"enable_thinking": True}
    tokenizer.chat_template = THINKS.replace("enable_thinking", "mood")
    assert find(tokenizer, {}, chat, train=template_advice.place_loss) == {}


@pytest.mark.parametrize(
    ("own", "kind", "advised"),
    [
        ("qwen3", "thoughts in all answers", "qwen3"),
        ("deepseek_r1_distill", "thoughts in all answers", "deepseek_r1_distill"),
        ("strips_all_thoughts", "thought in the last answer", ""),
        ("drops_the_system_prompt", "system prompt", ""),
    ],
)
def test_template_is_advised_only_where_it_trains_the_row_with_the_same_prompts(own, kind, advised):
    if advised and advised not in paths.list_templates():
        pytest.skip("the installed TRL has no such template")
    train.__globals__["get_encoder"].cache_clear()
    fix = trained(own, kind).fix
    assert fix.startswith(f"Set tokenizer.chat_template: {advised}, which trains this row.") == bool(advised)


def test_model_whose_template_ends_no_answer_is_told_the_template_that_does(here, go):
    original = paths.list_templates().get("glm4moe")
    if original is None:
        pytest.skip("the installed TRL has no template of GLM-4")
    models.base(here / "base")
    tokenizer = models.tokenizer(here / "base")
    strings = ["[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": strings})
    tokenizer.chat_template = original.with_name("glm4moe.jinja").read_text()
    tokenizer.save_pretrained(here / "base")
    jsonl(here / "r.jsonl", [{"messages": [Q1, A1]}] * 2)
    code, _, err = go("model: {name_or_path: ./base}\ndata: {train: r.jsonl}\n", command=["check"])
    assert code == 2
    assert "Set tokenizer.chat_template: glm4moe" in err
    tokenizer.chat_template = SHAPES["ends_nothing_appends_header"][0]
    tokenizer.save_pretrained(here / "base")
    code, _, err = go(None, command=["check"])
    assert code == 2
    assert "ends an assistant's turn with no token that generation could stop on" in err
    assert "glm4moe" not in err


@pytest.mark.parametrize("name", ["qwen3_6", "qwen3_8", "qwen3_5_think", "qwen3_5_nothink"])
def test_template_that_refuses_a_system_prompt_alone_trains_a_chat_with_one(name, here, go):
    if name not in paths.list_templates():
        pytest.skip("the installed TRL has no such template")
    models.base(here / "base")
    jsonl(here / "r.jsonl", [{"messages": [system("Be brief."), Q1, A1, Q2, A2]}] * 2)
    text = f"model: {{name_or_path: ./base}}\ndata: {{train: r.jsonl}}\ntokenizer: {{chat_template: {name}}}\n"
    code, out, err = go(text, "train.max_length=2048", command=["preview"])
    assert code == 0, err
    assert "anb1 It is fine and good. anz1" in out


def test_rows_with_tools_use_the_named_template_for_tools(here, go):
    models.base(here / "base")
    tokenizer = models.tokenizer(here / "base")
    strings = ["<|sys|>", "<|usr|>", "<|bot|>", "<|obs|>", "<|fin|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": strings})
    tokenizer.chat_template = SHAPES["two_named_templates"][0]
    tokenizer.save_pretrained(here / "base")
    messages, tools = ROWS["call"]
    jsonl(here / "r.jsonl", [{"messages": messages, "tools": json.dumps(tools)}] * 2)
    text = "model: {name_or_path: ./base}\ndata: {train: r.jsonl}\n"
    code, out, err = go(text, "train.max_length=2048", command=["preview"])
    assert code == 0, err
    assert TOOL["function"]["description"] in out
    assert "<call>getweather" in out


TURNS = (
    "{% for item in messages %}{% if item['role'] == 'system' %}<|system|>\n{{ item['content'] }}"
    "{% elif item['role'] == 'user' %}<|user|>\n{{ item['content'] }}"
    "{% elif item['role'] == 'assistant' %}<|assistant|>\n{{ item['content'] }}{% endif %}{% endfor %}"
)
WITHOUT_END = {
    # habits of GLM-Edge (nothing ends an answer, the header is always appended) and of RWKV-World (two line breaks)
    "header": (TURNS + "<|assistant|>", "<|assistant|>⟦\nanb1 It is fine and good. anz1⟧⟦<|im_end|>⟧"),
    "breaks": (
        "{% for m in messages %}{{ m.role | capitalize + ': ' + m.content | trim + '\\n\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}Assistant:{% endif %}",
        "Assistant:⟦ anb1 It is fine and good. anz1⟧⟦<|im_end|>⟧",
    ),
    "one_break": (
        "{% for m in messages %}{{ m.role }}: {{ m['content'].strip() }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "assistant:⟦ anb1 It is fine and good. anz1⟧⟦<|im_end|>⟧",
    ),
}


@pytest.fixture
def without_end(here):
    """Write rows and a recipe whose template is the file chat.jinja."""
    jsonl(here / "r.jsonl", [{"messages": [Q1, A1, Q2, A2]}] * 2)
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ntokenizer: {chat_template: chat.jinja}\ndata: {train: r.jsonl}\n"
        "train: {output_dir: out, max_length: 512}\n"
    )
    return here


@pytest.mark.parametrize("name", WITHOUT_END)
def test_template_without_an_end_is_told_the_change_with_which_it_trains(name, without_end, go):
    template, expected = WITHOUT_END[name]
    (without_end / "chat.jinja").write_text(template)
    code, _, err = go(None, command=["preview"])
    assert code == 2
    new, old = re.search(r"rite `([^`]+)` everywhere in the template in place of `([^`]+)`", err).groups()
    assert ("Set `tokenizer.eos_token:" in err) == (name == "breaks")
    (without_end / "chat.jinja").write_text(template.replace(old, new))
    code, out, err = go(None, command=["preview"])
    assert code == 0, err
    assert expected in out


def test_line_breaks_end_answers_where_the_recipe_says_so(without_end, go):
    (without_end / "chat.jinja").write_text(WITHOUT_END["breaks"][0])
    code, out, err = go(None, 'tokenizer.eos_token="\\n\\n"', command=["preview"])
    assert code == 0, err
    assert "Assistant:⟦ anb1 It is fine and good. anz1⟧⟦\n\n⟧User: " in out
    jsonl(without_end / "r.jsonl", [{"messages": [Q1, {"role": "assistant", "content": "a\n\nb"}]}] * 2)
    code, _, err = go(None, 'tokenizer.eos_token="\\n\\n"', command=["preview"])
    assert code == 2
    assert r"the text holds '\n\n', a special token of this tokenizer" in err
