"""Chats in the shapes that data sets have are read as turns, or named with what to write."""

import json

import pytest

from trl_sft.data import messages as data_messages
from trl_sft.data import turn_shapes

TURNS = [{"role": "user", "content": "Say 'a'."}, {"role": "assistant", "content": 'It\'s "a".\n'}]
READ = {
    "list": TURNS,
    "mapping of lists": {"role": ["user", "assistant"], "content": [turn["content"] for turn in TURNS]},
    "mapping of lists by other names": {"from": ["human", "gpt"], "value": [turn["content"] for turn in TURNS]},
    "mapping of lists with a list of nulls": {
        "role": ["user", "assistant"],
        "content": [turn["content"] for turn in TURNS],
        "name": [None, None],
    },
    "JSON text": json.dumps(TURNS),
    "indented JSON text": json.dumps(TURNS, indent=1),
    "JSON text of a mapping of lists": json.dumps(
        {"role": ["user", "assistant"], "content": [turn["content"] for turn in TURNS]}
    ),
    "JSON text, encoded twice": json.dumps(json.dumps(TURNS)),
    "JSON text of each turn": [json.dumps(turn) for turn in TURNS],
    "turn and JSON text of a turn": [TURNS[0], json.dumps(TURNS[1])],
    "JSON text of a list of JSON texts": json.dumps([json.dumps(turn) for turn in TURNS]),
    "JSON text of an entry": [json.dumps({"human": TURNS[0]["content"], "assistant": TURNS[1]["content"]})],
    "a list of one chat": [TURNS],
    "JSON text of a turn in each line": "\n".join(json.dumps(turn | {"name": None}) for turn in TURNS),
    "Python text": repr(TURNS),
    "Python text of an array, as pandas writes it": "[" + "\n ".join(map(repr, TURNS)) + "]",
    "human and gpt": [{"from": "human", "value": TURNS[0]["content"]}, {"from": "gpt", "value": TURNS[1]["content"]}],
    "speaker and text": [
        {"speaker": "User", "text": TURNS[0]["content"]},
        {"speaker": "Bot", "text": TURNS[1]["content"]},
    ],
    "author and message": [
        {"author": "prompter", "message": TURNS[0]["content"]},
        {"author": "assistant", "message": TURNS[1]["content"]},
    ],
    "role and value": [{"role": "USER", "value": TURNS[0]["content"]}, {"role": "AI", "value": TURNS[1]["content"]}],
    "parts": [
        {"role": "user", "parts": [{"text": TURNS[0]["content"]}]},
        {"role": "model", "parts": [{"text": TURNS[1]["content"]}]},
    ],
    "parts of OpenAI's Responses": [
        {"role": "user", "content": [{"type": "input_text", "text": TURNS[0]["content"]}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": TURNS[1]["content"]}]},
    ],
    "speakers as keys": [{"user": TURNS[0]["content"]}, {"Assistant": TURNS[1]["content"]}],
    "keys in capitals": [
        {"Role": "User", "Content": TURNS[0]["content"]},
        {"FROM": "gpt", "VALUE": TURNS[1]["content"]},
    ],
    "pairs of role and text": [["user", TURNS[0]["content"]], ["assistant", TURNS[1]["content"]]],
    "human and assistant in one entry": [{"human": TURNS[0]["content"], "assistant": TURNS[1]["content"]}],
    "input and output in one entry": [{"input": TURNS[0]["content"], "output": TURNS[1]["content"], "system": ""}],
}


@pytest.mark.parametrize("shape", READ)
def test_chat_in_a_shape_of_the_field_is_read_as_turns(shape):
    assert data_messages.read_messages({"messages": READ[shape]}, "messages") == TURNS


REFUSED = {
    "texts": ["hello", "hi"],
    "pairs of texts": [["hello", "hi"], ["how are you", "fine"]],
    "one turn": TURNS[0],
    "mapping of turns": {"turns": TURNS},
    "chats in one row": [TURNS, TURNS],
    "texts with an object": ["hello", '{"a": 1}'],
    "lists of different lengths": {"role": ["user", "assistant"], "content": ["a"]},
    "plain text": "user: hello",
    "broken JSON": "[{'role': 'user', content",
    "empty list": [],
    "empty text": "",
    "nothing": None,
    "number": 7,
    "unknown speakers": [{"speaker": "customer", "text": "a"}, {"speaker": "agent", "text": "b"}],
    "no speaker": [{"content": "a"}],
    "a flag in place of a speaker": [{"is_human": True, "text": "a"}, {"is_human": False, "text": "b"}],
    "content as a list of texts": [{"role": "user", "content": ["a", "b"]}],
    "thinking as a part": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]}],
    "a thought of Gemini as a part": [{"role": "model", "parts": [{"text": "a", "thought": True}, {"text": "b"}]}],
    "bytes": [{"role": "user", "content": b"a"}],
    "a mapping as content": [{"role": "tool", "content": {"a": 5}}],
    "not a number": [{"role": "user", "content": float("nan")}],
    "a call as a part": [{"role": "assistant", "content": [{"type": "tool_use", "name": "f", "input": {}}]}],
    "a result as a part": [{"role": "user", "content": [{"type": "tool_result", "content": "5"}]}],
    "an image": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
}


def test_chat_that_leaves_open_who_speaks_is_named_with_what_to_write(matches):
    messages = []
    for shape, value in REFUSED.items():
        with pytest.raises(data_messages.FormatError) as error:
            data_messages.read_messages({"messages": value}, "messages")
        messages.append(f"{shape}: {error.value.problem}\n    -> {error.value.fix}")
    matches("turn_shapes_refused", "\n".join(messages) + "\n")


def test_system_prompt_of_an_entry_with_question_and_answer_is_a_turn():
    turns = turn_shapes.list_turns([{"system": "Be kind.", "input": "a", "output": "b"}])
    assert [turn["role"] for turn in turns] == ["system", "user", "assistant"]


def test_key_of_an_entry_that_nothing_reads_is_reported():
    row = {"messages": [{"human": "a", "assistant": "b", "rating": 5}]}
    assert set(data_messages.list_unread_keys(row)) == {"messages.rating"}
    row = {"messages": [{"role": "user", "content": "a", "text": "b"}]}
    assert set(data_messages.list_unread_keys(row)) == {"messages.text"}


def test_keys_of_a_mapping_of_lists_are_reported():
    row = {"messages": {"role": ["user"], "content": ["a"], "score": [1]}}
    assert set(data_messages.list_unread_keys(row)) == {"messages.score"}
