"""Tool calls and thoughts: rendered where the template renders them, kept as text and said where it does not."""

import json

import models
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import jsonl

from trl_sft import load_recipe
from trl_sft.data import messages
from trl_sft.recipe import paths
from trl_sft.training import stages
from trl_sft.training.stages import build_trainer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK = {"type": "function", "function": {"name": "clock", "description": "d", "parameters": {"type": "object"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
ASKED = {"role": "user", "content": "Rain?"}
CALLED = {"role": "assistant", "content": "", "tool_calls": [CALL]}
TOLD = {"role": "tool", "name": "weather", "content": "dry"}
ANSWERED = {"role": "assistant", "content": "No."}
CHAT = [ASKED, CALLED, TOLD, ANSWERED]
AS_TEXT = '<tool_call>\n{"name": "weather", "arguments": {"city": "Köln"}}\n</tool_call>'


def prepared(here, rows, template="qwen2_5", file="r.jsonl"):
    """Return the chat and the texts of TRL's prepared rows, with what is trained of each."""
    if not (here / "base").exists():
        models.base(here / "base")
    if rows is not None:
        jsonl(here / file, rows)
    (here / "recipe.yaml").write_text(
        f"model: {{name_or_path: ./base}}\ntokenizer: {{chat_template: {template}}}\n"
        f"data: {{train: {file}}}\ntrain: {{output_dir: out, max_length: 4096}}\n"
    )
    run = load_recipe("recipe.yaml")
    ready = stages.prepare(run)
    made = build_trainer(run, ready).train_dataset
    decode = ready.chat.tokenizer.decode
    trained = [decode([label for label in row["labels"] if label != -100]) for row in made]
    return ready, [decode(row["input_ids"]) for row in made], trained


WAYS = {
    "mapping": {"tool_calls": [CALL]},
    "arguments_as_json": {
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Köln"}'}}
        ]
    },
    "calls_as_json": {"tool_calls": json.dumps([CALL], ensure_ascii=False)},
    "bare": {"tool_calls": [{"name": "weather", "arguments": {"city": "Köln"}}]},
    "yesterdays_key": {"function_call": {"name": "weather", "arguments": '{"city": "Köln"}'}},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "tools", [[WEATHER], json.dumps([WEATHER]), [WEATHER["function"]]], ids=["list", "json", "bare"]
)
def test_calls_and_tools_however_written_are_rendered_alike(way, tools, here):
    called = {"role": "assistant", "content": None} | WAYS[way]
    ready, texts, trained = prepared(here, [{"messages": [ASKED, called, TOLD, ANSWERED], "tools": tools}] * 2)
    expected = ready.chat.tokenizer.apply_chat_template(CHAT, tools=[WEATHER], tokenize=False)
    assert texts == [expected] * 2
    assert AS_TEXT in trained[0]
    assert "No.<|im_end|>" in trained[0]
    assert "dry" not in trained[0]


def test_sharegpt_speakers_of_tools_mean_the_same(here):
    row = {
        "conversations": [
            {"from": "human", "value": "Rain?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Köln"}}'},
            {"from": "observation", "value": "dry"},
            {"from": "gpt", "value": "No."},
        ],
        "tools": json.dumps([WEATHER["function"]]),
    }
    ready, texts, _ = prepared(here, [row] * 2)
    assert texts[0] == ready.chat.tokenizer.apply_chat_template(CHAT, tools=[WEATHER], tokenize=False)


def test_rows_of_different_tools_do_not_get_each_others_keys(here):
    """Arrow gives every struct the keys of all rows; a template would print them as null."""
    other = {"type": "function", "function": {"name": "clock", "arguments": {"zone": "UTC"}}}
    second = [ASKED, CALLED | {"tool_calls": [other]}, TOLD | {"name": "clock"}, ANSWERED]
    rows = [{"messages": CHAT, "tools": [WEATHER]}, {"messages": second, "tools": [CLOCK]}]
    pq.write_table(pa.Table.from_pylist(rows), here / "r.parquet")
    read = pq.read_table(here / "r.parquet").to_pylist()
    assert read[0]["messages"][1]["tool_calls"][0]["function"]["arguments"] == {"city": "Köln", "zone": None}
    for source in (None, rows):
        _, texts, _ = prepared(here, source, file="r.parquet" if source is None else "r.jsonl")
        joined = "".join(texts)
        assert "null" not in joined
        assert '"arguments": {"zone": "UTC"}' in joined
        assert '"arguments": {"city": "Köln"}' in joined


def test_template_without_tools_keeps_them_as_text_and_says_so_once(here, capsys):
    _, texts, trained = prepared(here, [{"messages": CHAT, "tools": [WEATHER]}] * 2, "vicuna")
    said = [line for line in capsys.readouterr().out.splitlines() if "kept as text" in line]
    assert len(said) == 1
    assert "does not render tool answers and tool calls and tools" in said[0]
    assert json.dumps(WEATHER) in texts[0]
    assert f"ASSISTANT: {AS_TEXT}</s>USER: <tool_response>\ndry\n</tool_response> ASSISTANT: No.</s>" in texts[0]
    assert AS_TEXT in trained[0]


def test_answers_of_several_tools_become_one_turn():
    chat = messages.Chat([ASKED, CALLED, TOLD, TOLD | {"content": "wet"}, ANSWERED], [], 1)
    adapted = messages.adapt_to_template(chat, {"system"})
    assert [message["role"] for message in adapted.messages] == ["user", "assistant", "user", "assistant"]
    words = "<tool_response>\ndry\n</tool_response>\n<tool_response>\nwet\n</tool_response>"
    assert adapted.messages[2]["content"] == words
    assert chat.messages[2]["content"] == "dry", "the chat itself is unchanged"


def test_completion_of_several_messages_stays_the_completion():
    chat = messages.Chat([ASKED, CALLED, TOLD, TOLD, ANSWERED], [WEATHER], 4)
    adapted = messages.adapt_to_template(chat, {"system"})
    assert [message["role"] for message in adapted.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert adapted.completion_length == 3
    without = messages.adapt_to_template(chat, set())
    assert without.messages[0]["content"].startswith("You may call these functions:")
    assert without.messages[0]["content"].endswith("Rain?")
    assert without.completion_length == 3


THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}


@pytest.mark.parametrize("key", ["reasoning_content", "thinking", "reasoning"])
def test_thought_is_rendered_where_the_template_does(key, here):
    row = {"messages": [ASKED, {"role": "assistant", "content": "4", key: "two and two"}]}
    ready, texts, trained = prepared(here, [row] * 2, "qwen3")
    assert texts[0] == ready.chat.tokenizer.apply_chat_template([ASKED, THOUGHT], tokenize=False)
    assert "<think>\ntwo and two\n</think>\n\n4<|im_end|>" in trained[0]


def test_thought_stands_before_the_answer_where_the_template_has_no_place(here, capsys):
    _, _, trained = prepared(here, [{"messages": [ASKED, THOUGHT]}] * 2, "chatml")
    assert trained[0] == "<think>\ntwo and two\n</think>\n\n4<|im_end|>"
    assert "the chat template does not render reasoning: kept as text" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("template", "answer"),
    [("qwen3", "<think>\ntwo and two\n</think>\n\n4<|im_end|>"), ("chatml", "two and two\n\n4<|im_end|>")],
)
def test_chain_of_thought_is_a_thought_where_there_is_a_place_for_it(template, answer, here):
    row = {"problem": "2+2", "reasoning": "two and two", "answer": "4"}
    _, _, trained = prepared(here, [row] * 2, template)
    assert answer in trained[0]


def test_template_that_drops_the_thought_is_refused(here, go):
    """DeepSeek's template for its R1 distills leaves out all before </think>, which would then not be learned."""
    models.base(here / "base")
    jsonl(
        here / "r.jsonl",
        [{"messages": [ASKED, THOUGHT | {"reasoning_content": None, "content": "<think>a</think>4"}]}] * 2,
    )
    theirs = next(iter(paths.list_templates().values())).parent / "deepseek_r1_distill.jinja"
    if not theirs.is_file():
        pytest.skip("the installed TRL has no template that drops thoughts")
    (here / "r1.jinja").write_text(theirs.read_text())
    code, _, err = go("model: {name_or_path: ./base}\ntokenizer: {chat_template: r1.jinja}\ndata: {train: r.jsonl}\n")
    assert code == 2
    assert "the chat template drops a part of an answer" in err
