"""Chat templates: named, from a file, another tokenizer's; what they render, where a turn ends, what they lose."""

import shutil

import models
import pytest
from conftest import jsonl
from trl.chat_template_utils import is_chat_template_stop_token_trained

from trl_sft import load_recipe
from trl_sft.errors import UserError
from trl_sft.recipe import paths
from trl_sft.tokenization import chat_template
from trl_sft.training import stages
from trl_sft.training.stages import build_trainer

TURNS = [("user", "one"), ("assistant", "hello"), ("user", "two"), ("assistant", "good night")]
CHAT = [{"role": role, "content": words} for role, words in TURNS]
# pictures and sound are what these are for: they take no plain text as content, or end no turn
NOT_FOR_TEXT = {"idefics3", "llava_next", "smolvlm", "diffusion_gemma", "gemma4"}
NAMED = sorted(set(paths.list_templates()) - NOT_FOR_TEXT)
OURS = ["chatml", "vicuna", "alpaca", "chinese"]


# whose prompt at inference opens a thought that rows without one do not go on with
OPENS_A_THOUGHT = {
    *("deepseek_r1_distill", "deepseekv3", "nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super"),
    "nemotron_3_ultra",
}


def prepared(here, name, rows, *words):
    """Return tokenizer, TRL's prepared rows and the run's chat for a template on a base model."""
    if not (here / "base").exists():
        models.base(here / "base")
    jsonl(here / "r.jsonl", rows)
    (here / "recipe.yaml").write_text(
        f"model: {{name_or_path: ./base}}\ntokenizer: {{chat_template: {name}}}\n"
        "data: {train: r.jsonl}\ntrain: {output_dir: out}\n"
    )
    run = load_recipe("recipe.yaml", words)
    ready = stages.prepare(run)
    return ready.chat, build_trainer(run, ready).train_dataset


def spans(tokenizer, row):
    """Return the trained parts of a row as texts."""
    found, last = [], None
    for i, label in enumerate(row["labels"]):
        if label != -100:
            found = [*found, [label]] if last != i - 1 else [*found[:-1], [*found[-1], label]]
            last = i
    return [tokenizer.decode(ids) for ids in found]


@pytest.mark.parametrize("name", NAMED)
def test_named_template_trains_answers_and_the_token_that_ends_them(name, here):
    """Every template that has a name, of ours and of the installed TRL, on a base model without any."""
    accepted = ["run.allow=[prompt_mismatch]"] if name in OPENS_A_THOUGHT else []
    chat, rows = prepared(here, name, [{"messages": CHAT}] * 2, "train.max_length=8192", *accepted)
    tokenizer = chat.tokenizer
    assert chat.stop_token
    for row in rows:
        trained = spans(tokenizer, row)
        assert len(trained) == 2
        for said, words in zip(("hello", "good night"), trained, strict=True):
            assert said in words
            end = words.rpartition(said)[2].strip()
            assert end in tokenizer.get_vocab() or chat.stop_token in end, "the end is learned, as one token"
            assert "one" not in words
            assert "two" not in words
        assert chat.stop_token in trained[-1]
    assert is_chat_template_stop_token_trained(tokenizer)
    assert chat.notes[0].startswith(name), "what became of the template's tokens is said"
    assert not [line for line in chat.notes if "several tokens" in line], "each is one token now"


EXACT = {
    "chatml": "".join(f"<|im_start|>{role}\n{words}<|im_end|>\n" for role, words in TURNS),
    "vicuna": (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. "
        "USER: one ASSISTANT: hello</s>USER: two ASSISTANT: good night</s>"
    ),
    "alpaca": (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\none\n\n### Response:hello</s>\n\n### Instruction:\ntwo\n\n### Response:good night</s>"
    ),
    "chinese": (
        "以下是一个描述任务的指令，请写一个完成该指令的适当回复。"
        "\n\n### 指令:\none\n\n### 回复:hello</s>\n\n### 指令:\ntwo\n\n### 回复:good night</s>"
    ),
}


@pytest.mark.parametrize("name", OURS)
def test_our_templates_write_exactly_the_format(name, here):
    chat, rows = prepared(here, name, [{"messages": CHAT}] * 2)
    assert chat.tokenizer.decode(rows[0]["input_ids"]) == EXACT[name]


def test_vicuna_template_and_wording_write_the_same(here):
    """The template trains every answer, the wording the last; the text is one."""
    _, rows = prepared(here, "vicuna", [{"messages": CHAT}] * 2)
    words = ("tokenizer={}", "data.train={path: r.jsonl, wording: vicuna}")
    chat, worded = prepared(here, "vicuna", [{"messages": CHAT}] * 2, *words)
    assert worded[0]["input_ids"] == rows[0]["input_ids"]
    assert spans(chat.tokenizer, worded[0]) == [" good night</s>"]


@pytest.mark.parametrize("name", OURS)
def test_vocabulary_that_begins_every_text_with_a_token_begins_a_chat_with_it(name, here):
    begin = models.with_bos(here / "base")
    assert models.tokenizer(here / "base")("a")["input_ids"][0] == begin
    _, rows = prepared(here, name, [{"messages": CHAT}] * 2)
    assert rows[0]["input_ids"].count(begin) == 1
    assert rows[0]["input_ids"][0] == begin


def test_template_of_a_file_and_of_another_tokenizer_bring_their_tokens(here):
    rows = [{"messages": CHAT}] * 2
    shutil.copy(paths.list_templates()["chatml"], here / "mine.jinja")
    for value in ("mine.jinja", "trl_sft:tiny"):
        chat, prepared_rows = prepared(here, value, rows)
        assert chat.tokenizer.decode(prepared_rows[0]["input_ids"]) == EXACT["chatml"]
        assert chat.stop_token == "<|im_end|>"
        assert len(chat.new_tokens) == 2


def test_thoughts_that_a_template_strips_from_history_are_refused_or_not_learned(here):
    """Qwen3's own template renders the thoughts of the last answer alone; the others would be learned without."""
    theirs = next(iter(paths.list_templates().values())).parent / "qwen3.jinja"
    if not theirs.is_file():
        pytest.skip("the installed TRL has no template that strips thoughts")
    (here / "own.jinja").write_text(theirs.read_text())
    thinking = [
        turn | ({"reasoning_content": f"so {turn['content']}"} if turn["role"] == "assistant" else {}) for turn in CHAT
    ]
    with pytest.raises(UserError) as refused:
        prepared(here, "own.jinja", [{"messages": thinking}] * 2, "data.loss_on=assistant")
    assert "drops a part of an answer: 'so hello'" in refused.value.faults[0].problem
    assert "data.loss_on: last_turn" in refused.value.faults[0].fix
    chat, rows = prepared(here, "own.jinja", [{"messages": thinking}] * 2, "data.loss_on=last_turn")
    assert spans(chat.tokenizer, rows[0]) == ["<think>\nso good night\n</think>\n\ngood night<|im_end|>"]
    assert "so hello" not in chat.tokenizer.decode(rows[0]["input_ids"])


def test_text_that_begins_twice_with_the_first_token_is_refused(here):
    models.with_bos(here / "base")
    jsonl(here / "r.jsonl", [{"text": "fine"}, {"text": "<s>twice"}])
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: ./base}\ndata: {train: r.jsonl}\ntrain: {output_dir: out}\n"
    )
    with pytest.raises(UserError) as refused:
        stages.prepare(load_recipe("recipe.yaml"))
    assert refused.value.faults[0].where == "r.jsonl row 2 (line 2)"
    assert "begins with <s> twice" in refused.value.faults[0].problem


BAD = {
    "that_is_no_jinja": "{% for message in messages %}{{ message['content'] }",
    "that_raises": "{{ raise_exception('never') }}",
    "that_names_a_field_rows_have_not": (
        "{% for message in messages %}{{ message['from'] + ': ' + message['value'] + eos_token }}{% endfor %}"
    ),
    "that_names_a_field_silently": (
        "{% for message in messages %}{{ message['value'] }}{{ message.text }}{{ eos_token }}{% endfor %}"
    ),
    "that_ends_no_turn": (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    ),
    "whose_markers_leave_the_end_out": (
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% generation %}{{ message['content'] }}{% endgeneration %}{{ eos_token }}{% endfor %}"
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_template_that_cannot_train_is_refused(name, here, go, matches):
    (here / "bad.jinja").write_text(BAD[name])
    jsonl(here / "r.jsonl", [{"messages": CHAT}] * 2)
    text = "model: {name_or_path: trl_sft:tiny}\ntokenizer: {chat_template: bad.jinja}\ndata: {train: r.jsonl}\n"
    code, _, err = go(text)
    assert code == 2
    assert "Traceback" not in err
    matches(f"template_{name}", err)


def test_template_file_that_is_no_text_is_told(here, go):
    (here / "bad.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    text = "model: {name_or_path: trl_sft:tiny}\ntokenizer: {chat_template: bad.jinja}\ndata: {train: rows.jsonl}\n"
    code, _, err = go(text)
    assert code == 2
    assert "bad.jinja cannot be read" in err


def test_special_strings_that_are_several_tokens_are_said_or_made_one(here, go):
    """In a tokenizer's own template they are said; in one that the recipe brings they become tokens."""
    models.base(here / "base")
    shutil.copy(paths.list_templates()["chatml"], here / "base" / "chat_template.jinja")
    text = "model: {name_or_path: ./base}\ndata: {train: rows.jsonl}\n"
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert "ends an assistant's turn with no token that generation could stop on" in err
    template = (here / "base" / "chat_template.jinja").read_text().replace("'<|im_end|>'", "eos_token")
    (here / "base" / "chat_template.jinja").write_text(template)
    code, out, _ = go(text, command=["check"])
    assert code == 0
    assert "special strings that are several tokens in this vocabulary: <|im_start|> (" in out
    code, out, _ = go(text, "tokenizer.chat_template=chatml", command=["check"])
    assert code == 0
    assert "several tokens" not in out
    assert "<|im_start|>, <|im_end|> added" in out


def test_tokenizer_without_template_lends_none(here, go):
    models.base(here / "base")
    text = "model: {name_or_path: trl_sft:tiny}\ntokenizer: {chat_template: ./base}\ndata: {train: rows.jsonl}\n"
    code, _, err = go(text)
    assert code == 2
    assert "has no chat template itself" in err


def test_keywords_reach_the_template_in_training(here):
    source = paths.list_templates()["chatml"].read_text().replace("+ '\\n' }}", "+ (mood or '') + '\\n' }}", 1)
    (here / "mood.jinja").write_text(source)
    # the prompt of inference lacks the mood, in this template
    words = ("tokenizer.chat_template_kwargs={mood: ' (calm)'}", "run.allow=[prompt_mismatch, template_markers]")
    chat, rows = prepared(here, "mood.jinja", [{"messages": CHAT}] * 2, *words)
    assert "<|im_start|>user (calm)\none" in chat.tokenizer.decode(rows[0]["input_ids"])


def test_slow_tokenizer_is_said_and_refused_where_offsets_are_needed(here, go):
    models.slow(here / "m")
    text = "model: {name_or_path: ./m}\ndata: {train: rows.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    code, _, err = go(text)
    assert code == 2  # it ends each prompt with [SEP], which no prompt in a row has
    assert (
        "-> Use a tokenizer that adds no token after a prompt. Or accept it with run.allow: [prompt_mismatch]." in err
    )
    code, out, err = go(text, "run.allow=[prompt_mismatch]")
    assert code == 0, err
    assert "BertJapaneseTokenizer is a slow tokenizer: rows are tokenized one by one" in out
    code, _, err = go(text, "tokenizer.chat_template=chatml", "train.output_dir=b")
    assert code == 2
    assert "a slow tokenizer" in err


def test_what_a_template_renders_is_found_by_rendering():
    tokenizer = models.tokenizer(paths.EMBEDDED / "tiny")
    wanted = {
        "chatml": {"messages", "system", "tool"},
        "gemma": {"messages"},
        "qwen2_5": {"messages", "system", "tool", "tool_calls", "tools"},
        "qwen3": {"messages", "system", "tool", "tool_calls", "tools", "reasoning_content"},
    }
    for name, expected in wanted.items():
        tokenizer.chat_template = paths.list_templates()[name].read_text()
        found = set(chat_template.find_features("here", tokenizer, {}))
        assert expected <= found
        assert found - expected <= {"thinking", "reasoning"}


def test_template_that_no_row_uses_is_refused(here, go):
    models.base(here / "base")
    text = "model: {name_or_path: ./base}\ndata: {train: {path: rows.jsonl, wording: plain}}\n"
    code, _, err = go(text, "tokenizer.chat_template=chatml")
    assert code == 2
    assert "no row becomes a chat" in err


@pytest.mark.parametrize("name", ["messages", "add_generation_prompt", "tools", "return_dict"])
def test_keyword_that_transformers_gives_itself_is_refused(name, here, go):
    text = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\n"
    code, _, err = go(text, f"tokenizer={{chat_template_kwargs: {{{name}: 3}}}}")
    assert code == 2
    assert f"tokenizer.chat_template_kwargs.{name}" in err


def test_empty_template_file_is_told(here, go):
    (here / "empty.jinja").write_text("\n")
    text = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntokenizer: {chat_template: empty.jinja}\n"
    code, _, err = go(text)
    assert code == 2
    assert "empty.jinja is empty" in err


def test_template_that_writes_the_end_token_too_is_not_made_to_write_it_twice(here, go):
    """Phi-3's closes a chat with eos_token after <|end|>: generation stops on both, the text stays."""
    from transformers import GenerationConfig

    chat, rows = prepared(here, "phi3", [{"messages": CHAT[:2]}] * 2)
    assert chat.tokenizer.decode(rows[0]["input_ids"]).count("<|end|>") == 2
    code, _, _ = go(None, "train.max_steps=1")
    assert code == 0
    ids = chat.tokenizer.convert_tokens_to_ids(["<|end|>", "</s>"])
    assert set(ids) <= set(GenerationConfig.from_pretrained(here / "out").eos_token_id)


def test_thought_that_a_template_strips_from_earlier_turns_is_refused_with_the_way_out(here, go):
    models.base(here / "base")
    said = [{"role": "assistant", "content": words, "reasoning_content": f"so {words}"} for words in ("hello", "night")]
    jsonl(here / "r.jsonl", [{"messages": [CHAT[0], said[0], CHAT[2], said[1]]}] * 2)
    (here / "strips.jinja").write_text(
        "{% for message in messages %}{{ message['role'] + ': ' }}"
        "{% if message['role'] == 'user' %}{{ message['content'] + eos_token }}{% continue %}{% endif %}"
        "{% generation %}"
        "{% if loop.last and message.reasoning_content %}{{ '(' + message.reasoning_content + ') ' }}{% endif %}"
        "{{ message['content'] + eos_token }}{% endgeneration %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    text = "model: {name_or_path: ./base}\ntokenizer: {chat_template: strips.jinja}\ndata: {train: r.jsonl}\n"
    code, _, err = go(text)
    assert code == 2
    assert "drops a part of an answer: 'so hello'" in err
    assert "data.loss_on: last_turn" in err
    code, _, err = go(text, "data.loss_on=last_turn", command=["check"])
    assert code == 0, err


@pytest.mark.parametrize(
    ("template", "keyword", "fix", "edit"),
    [
        ("{{ x }}", "enable_thinking", "Remove it: the template reads no further names.", "remove"),
        (
            "{% if enable_thinking is defined %}{% endif %}",
            "enable_thinkin",
            "Did you mean `enable_thinking`?",
            "rename",
        ),
        ("{% if a is not defined %}{% endif %}{{ m.b is defined }}", "colour", "Use a name that it reads: a.", None),
    ],
)
def test_keyword_that_the_template_does_not_read_names_those_that_it_reads(template, keyword, fix, edit, go, here):
    body = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}{% endfor %}"
    (here / "t.jinja").write_text(template.replace("{{ x }}", "") + body)
    jsonl("rows.jsonl", [{"question": f"q{n}", "answer": f"a{n}"} for n in range(4)])
    text = "model: {name_or_path: trl_sft:tiny}\ndata: {train: {path: rows.jsonl, wording: chat}}\n"
    text += f"tokenizer: {{chat_template: ./t.jinja, chat_template_kwargs: {{{keyword}: true}}}}\n"
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert fix in err
    assert go(None, command=["fix"])[0] == (0 if edit else 2)
