"""Meaning that a row carries is never passed over: columns and keys of turns that nothing reads."""

import json

import pytest
from conftest import jsonl

from trl_sft import load_recipe
from trl_sft.data import key_meanings
from trl_sft.data.key_meanings import CONTEXT, HISTORY, LOSS, MEDIA, REASONING, SYSTEM, TEMPLATE, TOOLS
from trl_sft.errors import Edit, UserError
from trl_sft.training import stages

MODEL = "model: {name_or_path: trl_sft:tiny}\ntrain: {output_dir: out, max_steps: 1, logging_steps: 1}\n"
QA = {"question": "Colour?", "answer": "green"}
CHAT = {"messages": [{"role": "user", "content": "One."}, {"role": "assistant", "content": "good"}]}


def prepare(here, data, *words, extra=""):
    (here / "recipe.yaml").write_text(f"{MODEL}{extra}data: {data}\n", encoding="utf-8")
    return stages.prepare(load_recipe("recipe.yaml", words))


TURNS = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "Two."}]


def refuse(here, rows, data="{train: r.jsonl}"):
    """Return the faults of rows."""
    jsonl(here / "r.jsonl", rows)
    with pytest.raises(UserError) as error:
        prepare(here, data)
    return error.value.faults


@pytest.mark.parametrize(
    ("meaning", "names"),
    {
        SYSTEM: "system System system_prompt systemPrompt SYSTEM_PROMPT instruction_system system_message "
        "systemprompt sys persona developer_message instructions 系统提示词",
        CONTEXT: "context Context contexts background background_info passage document documents "
        "retrieved_docs input inputs user_input source_document evidence knowledge choices "
        "options schema article text",
        HISTORY: "history chat_history chathistory dialogue previous_messages conversation_history turns messages 历史",
        TOOLS: "tools tool available_tools functions function_list tool_list apis 工具",
        REASONING: "reasoning thinking thought thoughts chain_of_thought_reasoning model_reasoning cot "
        "rationale reasoning_details think 思考过程",
        LOSS: "loss loss_mask lossmask mask masked trainable train training train_on_turn trainOnTurn "
        "do_train learn weight sample_weight loss_weight weights is_trainable used_in_training "
        "train_detail labels skip exclude chosen",
        MEDIA: "image images image_url image_path audio video audio_file pixel_values 图片",
        TEMPLATE: "chat_template_kwargs enable_thinking",
        "": "id ID uuid source category lang language url title score rating tags model license split "
        "date created_at rendered prompt prompt_id context_length num_tools tool_count system_id "
        "document_id instruction_id attention_mask input_ids train_split training_data "
        "system_fingerprint token_count difficulty topic domain explanation metadata lossless "
        "ecosystem trainer systematic history_length num_turns max_tokens toxicity language_score "
        "dataset seed",
    }.items(),
)
def test_names_in_any_spelling_have_the_meaning_of_their_words(meaning, names):
    assert {name: key_meanings.find_meaning(name) for name in names.split()} == dict.fromkeys(names.split(), meaning)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("context", value, False) for value in (None, "", "  ", [], {}, [None, ""], "[]", "null", 4096, True)),
        *(("context", value, True) for value in ("The sky.", ["a", "b"], {"title": "x", "text": "y"})),
        *(("weight", value, False) for value in (1, 1.0, True, "1", "true", None)),
        *(("weight", value, True) for value in (0, 0.5, 2, False, "0", "0.5")),
        *(("masked", value, expected) for value, expected in ((True, True), (False, False), (0, False), (1, True))),
        *(("mask", value, True) for value in ("User", 0, 1, [0, 1])),
        *(("loss_mask", value, True) for value in ([1, 1], 1, 0)),
        *(("skip", value, expected) for value, expected in ((True, True), (False, False), ("a text", False))),
        *(("chosen", value, expected) for value, expected in ((False, True), (True, False), ("A long answer", False))),
        *(("no_loss", value, expected) for value, expected in ((True, True), (False, False), (1, True))),
        *(("do_not_train", value, expected) for value, expected in ((True, True), (False, False))),
        *(("images", value, expected) for value, expected in (([], False), (["a.png"], True), (None, False))),
        *(("enable_thinking", value, True) for value in (True, False)),
        *(("label", value, expected) for value, expected in ((False, True), (True, False), (0, False), ("no", False))),
        *(("channel", value, value == "analysis") for value in ("analysis", "final", "news")),
        *(("role", value, expected) for value, expected in (("prompter", True), ("nurse", False), (None, False))),
    ],
)
def test_values_that_are_empty_or_say_what_holds_anyway_carry_no_meaning(name, value, expected):
    assert key_meanings.carries_meaning(name, value) is expected


def test_text_that_is_read_anyway_is_not_missed():
    assert not key_meanings.carries_meaning("instructions", "Colour?", row_text="Colour?\0green")
    assert not key_meanings.carries_meaning("text", "Q: Colour? A: green", row_text="Colour?\0green")
    assert key_meanings.carries_meaning("text", "The sky is green.", row_text="Colour?\0green")


@pytest.mark.parametrize(
    ("row", "name", "fix"),
    [
        (
            {"context": "The sky is green.", **QA},
            "context",
            "Set `format: alpaca` and `rename: {question: instruction, answer: output, context: input}`",
        ),
        (
            {"system": "Answer in French.", **QA},
            "system",
            "Set `format: alpaca` and `rename: {question: instruction, answer: output}`",
        ),
        ({"chat_history": [["a", "b"]], **QA}, "chat_history", "Set `format: alpaca`"),
        (
            {"reasoning": "Because.", **QA},
            "reasoning",
            "Set `format: chain_of_thought` and `rename: {question: problem}`",
        ),
        ({"instruction": "a", "output": "b", "context": "c"}, "context", "Set `rename: {context: input}`"),
        ({"instruction": "a", "output": "b", "available_tools": ["f"]}, "available_tools", "Name it in a wording"),
        ({"system_prompt": "Be brief.", **CHAT}, "system_prompt", "Set `rename: {system_prompt: system}`"),
        ({"functions": [{"name": "f"}], **CHAT}, "functions", "Set `rename: {functions: tools}`"),
        ({"prompt": "a", "completion": "b", "system": "c"}, "system", ""),
        ({"documents": [{"text": "x"}], **CHAT}, "documents", "Name it in a wording"),
        ({"weight": 0.5, **QA}, "weight", "Leave out rows"),
        ({"train": False, **CHAT}, "train", "Leave out rows"),
        ({"mask": "User", **CHAT}, "mask", "Leave out rows"),
        ({"images": ["a.png"], **CHAT}, "images", "this version trains on text alone"),
        (
            {"chat_template_kwargs": {"enable_thinking": False}, **CHAT},
            "chat_template_kwargs",
            "tokenizer.chat_template_kwargs",
        ),
        ({"text": "a", "input": "b"}, "input", "Put it into the text"),
    ],
)
def test_column_with_a_meaning_that_nothing_reads_is_refused_with_what_to_write(row, name, fix, here):
    (fault,) = refuse(here, [row])
    assert fault.code == "data.unused_meaning"
    assert f"the column {name} is not read by format" in fault.problem
    assert "it is filled in 1 row, the first is r.jsonl row 1" in fault.problem
    assert fix in fault.fix
    assert "run.allow: [unused_columns]" in fault.fix


@pytest.mark.parametrize(
    "row",
    [{"context": "The sky is green.", **QA}, {"system_prompt": "Be brief.", **CHAT}, {"reasoning": "Because.", **QA}],
)
def test_what_the_fix_says_trains_with_the_column(row, here):
    (fault,) = refuse(here, [row] * 4)
    (edit,) = fault.edits
    assert edit == Edit("set", ("data", "train"), edit.value)
    ready = prepare(here, f"{{train: {json.dumps(edit.value)}}}")
    text = ready.chat.tokenizer.decode(ready.datasets.train[0]["input_ids"])
    assert next(value for value in row.values() if isinstance(value, str)) in text


def test_fix_keeps_the_renames_that_the_source_has(here):
    row = {"instruction": "Sum it up.", "context": "A long text.", "response": "s", "category": "x"}
    (fault,) = refuse(here, [row] * 2, "{train: {path: r.jsonl, rename: {response: output}}}")
    assert "Set `rename: {response: output, context: input}`" in fault.fix
    assert fault.edits == (Edit("set", ("data", "train", "rename"), {"response": "output", "context": "input"}),)
    ready = prepare(here, "{train: {path: r.jsonl, rename: {response: output, context: input}}}")
    assert ready.rows.notes[0].endswith("not used: category")


@pytest.mark.parametrize(
    ("row", "name", "fix"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, "column label", "Leave out rows with"),
        (
            {"text": "A long story.", "summary": "A story."},
            "column summary",
            "If summary is what to train, set `rename: {text: question, summary: answer}`.",
        ),
        ({"text": "Hello.", "role": "prompter", "parent_id": None}, "column role", "Join the turns of a chat into one"),
        (
            {"messages": [TURNS[0], {"role": "assistant", "content": "t", "channel": "analysis"}, TURNS[1]]},
            "key messages.channel",
            "Write a text of the channel analysis as `reasoning_content`",
        ),
    ],
)
def test_rows_of_other_objectives_and_parts_of_answers_are_named(here, row, name, fix):
    (fault,) = refuse(here, [row] * 2)
    assert f"the {name} is not read" in fault.problem
    assert fix in fault.fix


def test_answer_that_the_text_of_the_row_holds_is_not_missed(here):
    jsonl(here / "r.jsonl", [{"text": "Q: Colour? A: green", "answer": "green", "output": ""}] * 2)
    assert prepare(here, "{train: r.jsonl}").rows.notes[0].endswith("not used: answer, output")


@pytest.mark.parametrize("system", [[{"type": "text", "text": "Be kind."}], {"parts": [{"text": "Be kind."}]}])
def test_system_prompt_in_parts_is_read(here, system):
    jsonl(here / "r.jsonl", [{"messages": TURNS, "system": system}] * 2)
    ready = prepare(here, "{train: r.jsonl}")
    assert "Be kind." in ready.chat.tokenizer.decode(ready.datasets.train[0]["input_ids"])


@pytest.mark.parametrize("value", [None, "", [], {}])
def test_column_that_is_empty_in_every_row_is_not_refused(value, here):
    jsonl(here / "r.jsonl", [{"context": value, "system_prompt": value, "images": value, **QA}] * 3)
    ready = prepare(here, "{train: r.jsonl}")
    assert "not used: context, images, system_prompt" in ready.rows.notes[0]


def test_column_that_one_late_row_fills_is_refused_and_the_row_is_named(here):
    rows = [{"context": "", **QA}] * 30 + [{"context": "x", **QA}, {"context": "y", **QA}] + [QA] * 5
    (fault,) = refuse(here, rows)
    assert "it is filled in 2 rows, the first is r.jsonl row 31" in fault.problem


def test_accepted_columns_are_told_in_each_run(here, go):
    jsonl(here / "r.jsonl", [{"context": "The sky is green.", **QA}, {"context": "", **QA}])
    text = f"{MODEL}data: {{train: r.jsonl}}\nrun: {{allow: [unused_columns], overwrite: true}}\n"
    for command in (["check"], ["prepare"], [], ["preview"]):
        code, out, err = go(text, command=command)
        assert code == 0, err
        assert "r.jsonl: not used, as run.allow: [unused_columns] accepts: context in 1 row" in out


def test_every_command_refuses_and_tells_all_sources_and_bad_rows_at_once(here, go):
    jsonl(here / "a.jsonl", [{"context": "x", **QA}, {"question": "a", "answer": ""}])
    jsonl(here / "b.jsonl", [{"system": "x", "weight": 0, **QA}, QA])
    for command in (["check"], ["prepare"], [], ["preview"]):
        code, _, err = go(f"{MODEL}data: {{train: [a.jsonl, b.jsonl]}}\n", command=command)
        assert code == 2
        assert "4 problems to fix" in err, err
        for words in ("column context is not", "column system is not", "column weight is not", "answer is empty"):
            assert words in err


def test_harmless_columns_stay_a_word_on_the_line_of_the_source(here):
    jsonl(
        here / "r.jsonl",
        [{"id": 3, "category": "x", "context_length": 7, "num_tools": 2, "rendered": "<|im_end|>", **QA}],
    )
    ready = prepare(here, "{train: r.jsonl}")
    assert ready.rows.notes[0].endswith("not used: category, context_length, id, num_tools, rendered")


def test_special_token_in_a_column_or_key_that_nothing_reads_is_no_fault(here):
    turns = [{"role": "user", "content": "a", "raw": "<|im_start|>user"}, {"role": "assistant", "content": "b"}]
    jsonl(here / "r.jsonl", [{"messages": turns, "rendered": "<|im_start|>user\nSay a.<|im_end|>\n"}])
    assert prepare(here, "{train: r.jsonl}").datasets.ledger["train"]["rows"]["kept"] == 1
    turns[0]["content"] = "<|im_start|>"
    (fault,) = refuse(here, [{"messages": turns}])
    assert fault.code == "data.special_token_in_text"


def loss_texts(here, rows, *words):
    """Return the decoded tokens with loss of each row."""
    jsonl(here / "r.jsonl", rows)
    ready = prepare(here, "{train: r.jsonl}", *words)
    decode = ready.chat.tokenizer.decode
    return [decode([label for label in row["labels"] if label != -100]) for row in ready.datasets.train]


@pytest.mark.parametrize(
    "key", ["loss", "train", "weight", "trainable", "training", "learn", "Loss", "train_on_turn", "trainOnTurn"]
)
@pytest.mark.parametrize(("off", "on"), [(False, True), (0, 1), (0.0, 1.0)])
def test_turn_that_says_that_it_carries_no_loss_carries_none(key, off, on, here):
    turns = [
        {"role": "user", "content": "One."},
        {"role": "assistant", "content": "bad", key: off},
        {"role": "user", "content": "Again."},
        {"role": "assistant", "content": "good", key: on},
    ]
    assert loss_texts(here, [{"messages": turns}] * 2) == ["good<|im_end|>"] * 2


@pytest.mark.parametrize(("key", "off", "on"), [("masked", True, False), ("masked", 1, 0), ("loss_mask", 0, 1)])
def test_turn_whose_loss_is_masked_carries_none(key, off, on, here):
    turns = [
        {"from": "human", "value": "One."},
        {"from": "gpt", "value": "bad", key: off},
        {"from": "human", "value": "Again."},
        {"from": "gpt", "value": "good", key: on},
    ]
    assert loss_texts(here, [{"conversations": turns}] * 2) == ["good<|im_end|>"] * 2


@pytest.mark.parametrize(
    ("key", "value"),
    [("loss", 0.5), ("loss", "no"), ("weight", 2), ("loss_mask", True), ("train", [0, 1]), ("masked", "x")],
)
def test_turn_with_another_value_of_a_loss_key_is_a_bad_row(key, value, here):
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "bad", key: value}]
    (fault,) = refuse(here, [{"messages": turns}])
    assert fault.code == "data.invalid_turn_weight"
    assert f"messages has a turn with {key}: {value!r} (turn 2)" in fault.problem


def test_turns_that_contradict_themselves_are_bad_rows(here):
    both = {"role": "assistant", "content": "x", "loss": True, "masked": True}
    faults = refuse(
        here,
        [
            {"messages": [{"role": "user", "content": "One."}, both]},
            {"messages": [{"role": "user", "content": "One.", "loss": True}, {"role": "assistant", "content": "x"}]},
            {
                "messages": [
                    {"role": "user", "content": "One."},
                    {"role": "assistant", "content": "x", "reasoning": "a", "thinking": "b"},
                ]
            },
        ],
    )
    assert [fault.where for fault in faults] == [f"r.jsonl row {n} (line {n})" for n in (1, 2, 3)]
    assert "loss: True and masked: True" in faults[0].problem
    assert "user turn with loss: True" in faults[1].problem
    assert "different texts under thinking and reasoning" in faults[2].problem


@pytest.mark.parametrize(
    ("key", "value", "fix"),
    [
        ("mask", 1, "Write `loss: true` or `loss: false` in the turns of messages, in place of `mask`."),
        ("train_detail", [{"begin": 0, "train": False}], "Write `loss: true`"),
        ("thoughts", "hm", "Name the key `reasoning_content`"),
        ("functions", [{"name": "f"}], "the column `tools`"),
        ("context", "a text", "content of the turns"),
        ("images", ["a.png"], "text alone"),
    ],
)
def test_key_of_a_turn_with_a_meaning_that_nothing_reads_is_refused(key, value, fix, here):
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "good", key: value}]
    (fault,) = refuse(here, [{"messages": turns}])
    assert f"the key messages.{key} is not read by format messages" in fault.problem
    assert fix in fault.fix
    empty = [turns[0], turns[1] | {key: None}]
    jsonl(here / "r.jsonl", [{"messages": empty}])
    assert prepare(here, "{train: r.jsonl}").datasets.ledger["train"]["rows"]["kept"] == 1


def test_keys_of_turns_in_a_cell_of_csv_are_looked_at_too(here):
    turns = [{"role": "user", "content": "One."}, {"role": "assistant", "content": "good", "thoughts": "hm"}]
    cell = json.dumps(turns).replace('"', '""')
    (here / "r.csv").write_text(f'messages\n"{cell}"\n')
    with pytest.raises(UserError, match=r"the key messages\.thoughts is not read"):
        prepare(here, "{train: r.csv}")


def test_system_prompt_in_two_places_is_refused_unless_it_is_the_same(here):
    turns = [{"role": "system", "content": "Be brief."}, *CHAT["messages"]]
    assert loss_texts(here, [{"system": "Be brief. ", "messages": turns}]) == ["good<|im_end|>"]
    (fault,) = refuse(here, [{"system": "Be long.", "messages": turns}])
    assert fault.code == "data.system_prompt"
    assert "the column system and the first turn of messages hold different system prompts" in fault.problem
    history = [{"role": "system", "content": "Be brief."}]
    (fault,) = refuse(here, [{"system": "Be long.", "history": history, "instruction": "a", "output": "b"}])
    assert "the first turn of history hold different" in fault.problem
    jsonl(here / "r.jsonl", [{"system": "Be brief.", "history": history, "instruction": "a", "output": "b"}])
    ready = prepare(here, "{train: r.jsonl}")
    assert ready.chat.tokenizer.decode(ready.datasets.train[0]["input_ids"]).count("Be brief.") == 1


def test_function_whose_result_has_a_column_that_nothing_reads_is_refused(here):
    (here / "f.py").write_text("def f(row):\n    return {'question': 'a', 'answer': 'b', 'context': row['c']}\n")
    (fault,) = refuse(here, [{"c": "The sky.", "context": "x"}], "{train: {path: r.jsonl, format: 'f.py:f'}}")
    assert "the column context is not read by format question_answer" in fault.problem
    assert "leave it out of what f returns" in fault.fix


def test_function_may_leave_out_any_column_of_the_file(here):
    (here / "f.py").write_text("def f(row):\n    return {'question': row['q'], 'answer': 'b'}\n")
    jsonl(here / "r.jsonl", [{"q": "a", "context": "x", "loss": 0, "images": ["a.png"]}])
    assert prepare(here, "{train: {path: r.jsonl, format: 'f.py:f'}}").datasets.ledger["train"]["rows"]["kept"] == 1


def test_wording_of_the_recipe_that_leaves_out_a_context_is_refused_and_one_that_names_it_is_not(here):
    row = {"context": "The sky is green.", **QA}
    data = "{train: {path: r.jsonl, wording: {prompt: '{question}', completion: ' {answer}'}}}"
    (fault,) = refuse(here, [row], data)
    assert "the column context is not read by the wording" in fault.problem
    ready = prepare(here, data.replace("'{question}'", "'{context} {question}'"))
    assert ready.datasets.ledger["train"]["rows"]["kept"] == 1


def test_stream_refuses_a_later_row_whose_column_carries_a_meaning(here, go):
    jsonl(here / "r.jsonl", [QA] * 300 + [{"context": "x", **QA}] + [QA] * 50)
    text = (
        "model: {name_or_path: trl_sft:tiny}\n"
        "train: {output_dir: out, max_steps: 60, per_device_train_batch_size: 8, logging_steps: 30}\n"
        "data: {train: {path: r.jsonl, streaming: true}}\n"
    )
    code, _, err = go(text)
    assert code == 2
    assert "r.jsonl row 301" in err
    assert "the row has context" in err
    assert go(text + "run: {allow: [unused_columns], overwrite: true}\n")[0] == 0


def test_evaluation_set_is_looked_at_too(here):
    jsonl(here / "e.jsonl", [{"system": "x", "question": "b", "answer": "c"}])
    jsonl(here / "r.jsonl", [QA])
    with pytest.raises(UserError, match="the column system is not read"):
        prepare(here, "{train: r.jsonl, eval: e.jsonl}")
