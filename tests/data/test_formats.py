"""Every format in every wording that fits it: the exact prompt and completion, or the reason why not."""

import json

import pytest
from conftest import jsonl
from datasets import Dataset, Features, Json, List, Value

from trl_sft.data import formats, pipeline, user_function, wordings
from trl_sft.data import messages as data_messages
from trl_sft.data.formats import FORMATS, TokenizerFeatures
from trl_sft.data.source_format import SourceFormat
from trl_sft.data.wordings import MULTI_TURN, SINGLE_TURN
from trl_sft.recipe import sections

FEATURES = TokenizerFeatures(("messages", "system"), "</s>")


def format_row(row, format_name, wording, task=""):
    return formats.format_row(row, format_name, wording, features=FEATURES, task=task)


VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)
BELOW = "Below is an instruction that describes a task"
RIGHT = "Write a response that appropriately completes the request.\n\n### Instruction:\n"
CHINESE = "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n### 指令:\n"

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "prompt_completion": {"prompt": "q", "completion": "a"},
    "alpaca": {"instruction": "add", "input": "1 2", "output": "a"},
    "question_answer": {"question": "q", "answer": "a"},
    "conversation": {"history": [["h", "r"]], "human": "q", "assistant": "a"},
    "task": {"task": "summary", "input": "long", "output": "a"},
    "chain_of_thought": {"problem": "q", "reasoning": "so", "answer": "a"},
    "text": {"text": "a"},
}
# wording -> prompt and completion of a single question
QUESTION = {
    "plain": ("{}", "{}"),
    "alpaca": (f"{BELOW}. {RIGHT}{{}}\n\n### Response:", "{}"),
    "chinese": (CHINESE + "{}\n\n### 回复:", "{}"),
    "basic": ("### Instruction:\n{}\n\n### Response:\n", "{}"),
    "question_answer": ("### Question: {}\n### Answer:", " {}"),
    "vicuna": (VICUNA + "USER: {} ASSISTANT:", " {}"),
    "conversation": ("### Human: {}\n### Assistant:", " {}"),
}
SINGLE = {"messages": "q", "sharegpt": "q", "prompt_completion": "q", "question_answer": "q"}
# (format, wording) -> prompt and completion, where QUESTION is not enough
WITH_INPUT = (
    f"{BELOW}, paired with an input that provides further context. {RIGHT}add\n\n### Input:\n1 2\n\n### Response:"
)
CHINESE_INPUT = (
    "以下是一个描述任务的指令，并配有一个提供详细上下文信息的输入。请写一个完成该指令的适当回复。"
    "\n\n### 指令:\nadd\n\n### 输入:\n1 2\n\n### 回复:"
)
EXPECTED = {
    **{
        (format_name, w): (p.format(q), c.format("a"))
        for format_name, q in SINGLE.items()
        for w, (p, c) in QUESTION.items()
    },
    **{("alpaca", w): (p.format("add\n\n1 2"), c.format("a")) for w, (p, c) in QUESTION.items()},
    ("alpaca", "alpaca"): (WITH_INPUT, "a"),
    ("alpaca", "chinese"): (CHINESE_INPUT, "a"),
    ("alpaca", "basic"): ("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n", "a"),
    ("conversation", "vicuna"): (VICUNA + "USER: h ASSISTANT: r</s>USER: q ASSISTANT:", " a"),
    ("conversation", "conversation"): ("### Human: h\n### Assistant: r\n### Human: q\n### Assistant:", " a"),
    **{("task", w): (p.format("Summarize the text.\n\nlong"), c.format("a")) for w, (p, c) in QUESTION.items()},
    ("task", "task"): ("### Text:\nlong\n\n### Summary:\n", "a"),
    ("task", "alpaca"): (WITH_INPUT.replace("add", "Summarize the text.").replace("1 2", "long"), "a"),
    ("task", "chinese"): (CHINESE_INPUT.replace("add", "Summarize the text.").replace("1 2", "long"), "a"),
    ("task", "basic"): ("### Instruction:\nSummarize the text.\n\n### Input:\nlong\n\n### Response:\n", "a"),
    **{("chain_of_thought", w): (p.format("q"), c.format("so\n\na")) for w, (p, c) in QUESTION.items()},
    ("chain_of_thought", "chain_of_thought"): ("### Problem:\nq\n\n### Reasoning:\n", "so\n\n### Answer:\na"),
}
REFUSED = {
    **{("conversation", w): "takes one question and one answer" for w in SINGLE_TURN},
    **{(format_name, "task"): "no task" for format_name in (*SINGLE, "alpaca", "chain_of_thought")},
    **{(format_name, "chain_of_thought"): "no reasoning" for format_name in (*SINGLE, "alpaca", "task")},
}


@pytest.mark.parametrize("wording", [*SINGLE_TURN, *MULTI_TURN])
@pytest.mark.parametrize("format_name", [name for name in FORMATS if name != "text"])
def test_every_format_in_every_wording_gives_exactly_this(format_name, wording):
    assert ((format_name, wording) in EXPECTED) != ((format_name, wording) in REFUSED), "the table is whole"
    if (format_name, wording) in REFUSED:
        with pytest.raises(data_messages.FormatError, match=REFUSED[format_name, wording]):
            format_row(ROWS[format_name], format_name, wording)
        return
    formatted = format_row(ROWS[format_name], format_name, wording).columns
    assert (formatted["prompt"], formatted["completion"]) == EXPECTED[format_name, wording]


def test_text_stays_as_it_is():
    assert format_row(ROWS["text"], "text", "as it is").columns == {"text": "a"}


IN_CHAT = {
    **{format_name: [("user", "q"), ("assistant", "a")] for format_name in SINGLE},
    "alpaca": [("user", "add\n\n1 2"), ("assistant", "a")],
    "conversation": [("user", "h"), ("assistant", "r"), ("user", "q"), ("assistant", "a")],
    "task": [("user", "Summarize the text.\n\nlong"), ("assistant", "a")],
    "chain_of_thought": [("user", "q"), ("assistant", "so\n\na")],
}


@pytest.mark.parametrize("format_name", IN_CHAT)
def test_every_format_as_a_chat_gives_exactly_these_turns(format_name):
    formatted = format_row(ROWS[format_name], format_name, "chat").columns
    messages = [(turn["role"], turn["content"]) for turn in formatted["prompt"] + formatted["completion"]]
    assert messages == IN_CHAT[format_name]
    assert len(formatted["completion"]) == 1


@pytest.mark.parametrize("format_name", ROWS)
def test_format_is_recognised_by_its_columns(format_name):
    assert formats.recognise(ROWS[format_name]) == [format_name]


def test_sections_list_every_wording():
    listed = sections.OWN_KEYS["data.*"]["wording"]
    assert all(f"'{name}'" in listed for name in ("chat", *SINGLE_TURN, *MULTI_TURN))
    assert listed.count("'") == 2 * len(("chat", *SINGLE_TURN, *MULTI_TURN))


TASKS = {
    "question-answer": "### Question:\nx\n\n### Answer:\n",
    "Summary": "### Text:\nx\n\n### Summary:\n",
    "translation": "### Text:\nx\n\n### Translation:\n",
    "classification": "### Text:\nx\n\n### Class:\n",
    "generation": "### Prompt:\nx\n\n### Text:\n",
    "Sort the words.": "### Task:\nSort the words.\n\n### Input:\nx\n\n### Output:\n",
}


@pytest.mark.parametrize("task", TASKS)
def test_task_chooses_the_wording_from_column_or_source(task):
    row = {"task": task, "input": "x", "output": "y"}
    assert format_row(row, "task", "task").columns == {"prompt": TASKS[task], "completion": "y"}
    without = {"input": "x", "output": "y"}
    formatted = format_row(without, "task", "task", task=task).columns
    assert formatted == {"prompt": TASKS[task], "completion": "y"}
    question = {"question": "x", "answer": "y"}
    formatted = format_row(question, "question_answer", "task", task=task).columns
    assert formatted["prompt"] == TASKS[task]


def test_task_without_input_has_no_empty_heading():
    formatted = format_row({"task": "Write a haiku.", "input": "", "output": "y"}, "task", "task")
    assert formatted.columns["prompt"] == "### Task:\nWrite a haiku.\n\n### Output:\n"
    chat = format_row({"task": "Write a haiku.", "input": "", "output": "y"}, "task", "chat")
    assert chat.columns["prompt"][0]["content"] == "Write a haiku."


@pytest.mark.parametrize(
    "history",
    [
        [["h", "r"]],
        [{"human": "h", "assistant": "r"}],
        [{"role": "user", "content": "h"}, {"role": "assistant", "content": "r"}],
        [{"from": "human", "value": "h"}, {"from": "gpt", "value": "r"}],
    ],
)
def test_history_may_be_pairs_or_turns(history):
    formatted = format_row({"history": history, "human": "q", "assistant": "a"}, "conversation", "chat")
    assert [turn["content"] for turn in formatted.columns["prompt"]] == ["h", "r", "q"]


def test_history_as_one_text_stands_before_the_question():
    row = {"history": "H: hi\nA: hello\n", "human": "q", "assistant": "a"}
    formatted = format_row(row, "conversation", "conversation").columns
    assert formatted["prompt"] == "H: hi\nA: hello\n### Human: q\n### Assistant:"


def test_alpaca_rows_may_bring_a_system_prompt_and_a_history():
    """As LLaMA-Factory's data has them."""
    row = ROWS["alpaca"] | {"system": "be kind", "history": [["h", "r"]]}
    formatted = format_row(row, "alpaca", "chat").columns
    assert [turn["role"] for turn in formatted["prompt"]] == ["system", "user", "assistant", "user"]
    empty = ROWS["alpaca"] | {"system": "", "history": []}
    assert format_row(empty, "alpaca", "alpaca") == format_row(ROWS["alpaca"], "alpaca", "alpaca")


def test_system_prompt_takes_the_place_of_vicunas_own():
    messages = [{"role": "system", "content": "be kind"}, *ROWS["messages"]["messages"]]
    formatted = format_row({"messages": messages}, "messages", "vicuna").columns
    assert formatted["prompt"] == "be kind USER: q ASSISTANT:"
    with pytest.raises(data_messages.FormatError, match="takes one question and one answer, not system"):
        format_row({"messages": messages}, "messages", "alpaca")


def test_content_in_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
    formatted = format_row(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]},
        "messages",
        "chat",
    )
    assert formatted.columns["prompt"] == [{"role": "user", "content": "q!"}]


@pytest.mark.parametrize(("written", "meant"), list(data_messages.ROLES.items()))
def test_every_role_is_read_as_one_of_four(written, meant):
    assert meant in {"system", "user", "assistant", "tool"}


# through the command line ------------------------------------------------------------------------------------


FUNCTIONS = """
def chat(row):
    return {"messages": [{"role": "user", "content": row["frage"]}, {"role": "assistant", "content": row["antwort"]}]}

def text(row):
    return row["frage"] + " " + row["antwort"]

def broken(row):
    return {"prompt": row["frage"], "completion": row["answer"]}

def number(row):
    return 7

nothing = 3
"""
GERMAN = [{"frage": f"Was ist {n} plus {n}?", "antwort": str(n + n)} for n in range(8)]


@pytest.fixture
def german(here, go):
    jsonl(here / "g.jsonl", GERMAN)
    (here / "rows.py").write_text(FUNCTIONS)
    (here / "pack").mkdir()
    (here / "pack" / "__init__.py").write_text("")
    (here / "pack" / "rows.py").write_text("from .more import chat\n")
    (here / "pack" / "more.py").write_text(FUNCTIONS)

    def call(keywords, *words):
        source = f"{{path: g.jsonl{keywords}}}"
        text = f"model: {{name_or_path: trl_sft:tiny}}\ndata: {{train: {source}}}\n"
        return go(text + "train: {output_dir: out, max_steps: 1}\n", *words)

    return call


def test_columns_of_other_names_are_renamed(german):
    code, out, _ = german(", rename: {frage: question, antwort: answer}")
    assert code == 0
    assert "format question_answer, wording chat" in out


@pytest.mark.parametrize("name", ["rows.py:chat", "./rows.py:chat", "pack.rows:chat", "rows:chat"])
def test_own_function_is_called_for_every_row(name, german, here):
    code, out, err = german(f", format: '{name}'")
    assert code == 0, err
    assert f"{name} -> format messages, wording chat" in out


def test_own_function_runs_again_from_the_resolved_recipe(german, here, monkeypatch):
    from trl_sft import cli

    assert german(", format: 'rows.py:chat'")[0] == 0
    (here / "else").mkdir()
    monkeypatch.chdir(here / "else")
    assert cli.main([str(here / "out" / "resolved.yaml"), "train.output_dir=again"]) == 0
    first, second = ((p / "model.safetensors").read_bytes() for p in (here / "out", here / "else" / "again"))
    assert first == second


def test_own_function_may_return_a_text(german):
    code, out, _ = german(", format: 'rows.py:text'")
    assert code == 0
    assert "format text, wording as it is" in out


def test_own_function_that_changed_does_not_read_the_cache_of_the_old_one(german, here):
    def tokens(*words):
        code, out, err = german(", format: 'rows.py:text'", "run.overwrite=true", *words)
        assert code == 0, err
        return next(line for line in out.splitlines() if line.strip().startswith("tokens"))

    before = tokens()
    (here / "rows.py").write_text(FUNCTIONS.replace('" " + row', '" and so on and on " + row'))
    user_function.import_function.cache_clear()  # a new process would have none
    assert tokens() != before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rows.py:broken", "g.jsonl row 1\n    broken raised KeyError: 'answer'"),
        ("rows.py:number", "number returned int"),
        ("rows.py:nothing", "nothing is int, not a function"),
        ("rows.py:gone", "cannot be imported: AttributeError"),
    ],
)
def test_own_function_that_fails_is_refused_with_its_row(name, message, german):
    code, _, err = german(f", format: '{name}'")
    assert code == 2
    assert message in err


def test_changed_function_is_not_resumed_silently(german, here):
    assert german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")[0] == 75
    (here / "rows.py").write_text(FUNCTIONS + "\n# changed\n")
    code, _, err = german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")
    assert code == 2
    assert "run.allow: [changed_data]" in err


def test_task_label_of_a_source_is_shown(german):
    code, out, _ = german(", rename: {frage: question, antwort: answer}, task: math")
    assert code == 0
    assert "task math" in out


def test_base_model_takes_the_formats_own_wording_and_vicuna_when_asked(here, go):
    import models

    models.base(here / "base")
    jsonl(here / "m.jsonl", [ROWS["messages"]] * 4)
    text = "model: {name_or_path: ./base}\ndata: {train: m.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    code, _, err = go(text)
    assert code == 2
    assert "Set `tokenizer.chat_template: chatml`, set `wording` to vicuna or conversation" in err
    assert go(text, "data.train={path: m.jsonl, wording: vicuna}")[0] == 0
    assert wordings.known_task("") == ""


def test_task_of_the_source_holds_for_all_its_rows():
    formatted = format_row(ROWS["task"], "task", "task", task="translation")
    assert formatted.columns["prompt"] == "### Text:\nlong\n\n### Translation:\n"


@pytest.mark.parametrize("task", ["sumary", "translaton", "classificaton"])
def test_misspelt_task_is_refused_and_not_trained_as_an_instruction(task):
    with pytest.raises(data_messages.FormatError, match="is not a known task"):
        format_row(ROWS["task"] | {"task": task}, "task", "chat")


def test_formatting_is_cached_across_processes_and_not_when_an_imported_file_changes(here):
    """What datasets calls the formatted rows is the same in every process, whatever Python's hash seed."""
    import os
    import subprocess
    import sys

    (here / "rows.py").write_text("import words\ndef text(row):\n    return words.W + row['question']\n")
    (here / "words.py").write_text("W = 'a'\n")
    (here / "recipe.yaml").write_text(
        "model: {name_or_path: trl_sft:tiny}\ndata: {train: {path: rows.jsonl, format: 'rows.py:text'}}\n"
    )
    code = (
        "from trl_sft import load_recipe\nfrom trl_sft.training import stages as training\n"
        "for words in ([], ['data.train=rows.jsonl']):\n"
        "    print(training.prepare(load_recipe('recipe.yaml', words)).rows.train.rows._fingerprint)\n"
    )

    def names(seed):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
        return [line for line in done.stdout.split("\n") if line and " " not in line]

    first = names("1")
    assert len(first) == 2
    assert names("2") == first
    (here / "words.py").write_text("W = 'b'\n")
    changed = names("1")
    assert changed[0] != first[0]
    assert changed[1] == first[1]


@pytest.mark.parametrize("body", ["raise SystemExit(0)", "import nosuchmodule", "1 / 0"])
def test_own_file_that_exits_or_fails_on_import_is_refused(body, german, here):
    (here / "ends.py").write_text(f"{body}\ndef f(row): return 'a'\n")
    code, _, err = german(", format: 'ends.py:f'")
    assert code == 2
    assert "cannot be imported" in err


def test_own_file_may_use_dataclasses_and_lie_under_a_dotted_name(german, here):
    text = (
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Row:\n    words: str\ndef f(row): return Row(row['frage']).words\n"
    )
    (here / "my.rows.py").write_text(text)
    assert german(", format: 'my.rows.py:f'")[0] == 0


def test_keys_of_turns_that_nothing_reads_are_named_wherever_they_stand(here, go):
    plain = ROWS["messages"]["messages"]
    jsonl(
        here / "m.jsonl", [{"messages": plain}, {"messages": plain}, {"messages": [plain[0] | {"mood": "x"}, plain[1]]}]
    )
    code, out, _ = go("model: {name_or_path: trl_sft:tiny}\ndata: {train: m.jsonl}\n", command=["check"])
    assert code == 0
    assert "not used: messages.mood" in out


def format_messages(messages, column_types):
    """Return the content of the last message, formatted from a column `messages`."""
    source_format = SourceFormat("r", "messages", "chat", FEATURES)
    batch = {"messages": [messages]}
    formatted = pipeline.format_batch(batch, [0], source_format=source_format, column_types=column_types)
    return formatted["completion"][0][0]["content"]


def test_null_of_json_is_trained_and_null_that_arrow_adds_to_a_struct_is_not():
    call = {"function": {"name": "f", "arguments": {"x": None, "y": 1}}}
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    text = Features({"messages": Value("string")})
    assert '"x": null' in format_messages(json.dumps(messages), text)
    turn = {"role": Value("string"), "content": Value("string"), "tool_calls": Json()}
    assert '"x": null' in format_messages(messages, Features({"messages": List(turn)}))
    rows = Dataset.from_list([{"messages": messages}])
    assert '"x"' not in format_messages(rows[0]["messages"], rows.features)
