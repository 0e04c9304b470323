"""Every layout in every wording that fits it: the exact prompt and completion, or why not."""

import pytest
from conftest import jsonl

from trl_sft.data import formats, wordings
from trl_sft.data import messages as data_messages
from trl_sft.data.formats import LAYOUTS, TokenizerFeatures
from trl_sft.data.wordings import CHATS, TURNS
from trl_sft.recipe import sections

TARGET = TokenizerFeatures(("messages", "system"), "</s>")
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
# what a single question is in each wording
ASKED = {
    "plain": ("{}", "{}"),
    "alpaca": (f"{BELOW}. {RIGHT}{{}}\n\n### Response:", "{}"),
    "chinese": (CHINESE + "{}\n\n### 回复:", "{}"),
    "basic": ("### Instruction:\n{}\n\n### Response:\n", "{}"),
    "question_answer": ("### Question: {}\n### Answer:", " {}"),
    "vicuna": (VICUNA + "USER: {} ASSISTANT:", " {}"),
    "conversation": ("### Human: {}\n### Assistant:", " {}"),
}
SINGLE = {"messages": "q", "sharegpt": "q", "prompt_completion": "q", "question_answer": "q"}
# (layout, wording) -> prompt and completion, where it is more than ASKED says
WITH_INPUT = (
    f"{BELOW}, paired with an input that provides further context. {RIGHT}add\n\n### Input:\n1 2\n\n### Response:"
)
CHINESE_INPUT = (
    "以下是一个描述任务的指令，并配有一个提供详细上下文信息的输入。请写一个完成该指令的适当回复。"
    "\n\n### 指令:\nadd\n\n### 输入:\n1 2\n\n### 回复:"
)
EXPECTED = {
    **{(layout, w): (p.format(q), c.format("a")) for layout, q in SINGLE.items() for w, (p, c) in ASKED.items()},
    **{("alpaca", w): (p.format("add\n\n1 2"), c.format("a")) for w, (p, c) in ASKED.items()},
    ("alpaca", "alpaca"): (WITH_INPUT, "a"),
    ("alpaca", "chinese"): (CHINESE_INPUT, "a"),
    ("alpaca", "basic"): ("### Instruction:\nadd\n\n### Input:\n1 2\n\n### Response:\n", "a"),
    ("conversation", "vicuna"): (VICUNA + "USER: h ASSISTANT: r</s>USER: q ASSISTANT:", " a"),
    ("conversation", "conversation"): ("### Human: h\n### Assistant: r\n### Human: q\n### Assistant:", " a"),
    **{("task", w): (p.format("Summarize the text.\n\nlong"), c.format("a")) for w, (p, c) in ASKED.items()},
    ("task", "task"): ("### Text:\nlong\n\n### Summary:\n", "a"),
    ("task", "alpaca"): (WITH_INPUT.replace("add", "Summarize the text.").replace("1 2", "long"), "a"),
    ("task", "chinese"): (CHINESE_INPUT.replace("add", "Summarize the text.").replace("1 2", "long"), "a"),
    ("task", "basic"): ("### Instruction:\nSummarize the text.\n\n### Input:\nlong\n\n### Response:\n", "a"),
    **{("chain_of_thought", w): (p.format("q"), c.format("so\n\na")) for w, (p, c) in ASKED.items()},
    ("chain_of_thought", "chain_of_thought"): ("### Problem:\nq\n\n### Reasoning:\n", "so\n\n### Answer:\na"),
}
REFUSED = {
    **{("conversation", w): "takes one question and one answer" for w in TURNS},
    **{(layout, "task"): "no task" for layout in (*SINGLE, "alpaca", "chain_of_thought")},
    **{(layout, "chain_of_thought"): "no reasoning" for layout in (*SINGLE, "alpaca", "task")},
}


@pytest.mark.parametrize("wording", [*TURNS, *CHATS])
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "text"])
def test_every_layout_in_every_wording_gives_exactly_this(layout, wording):
    assert ((layout, wording) in EXPECTED) != ((layout, wording) in REFUSED), "the table is whole"
    if (layout, wording) in REFUSED:
        with pytest.raises(data_messages.FormatError, match=REFUSED[layout, wording]):
            formats.form(ROWS[layout], layout, wording, TARGET)
        return
    made = formats.form(ROWS[layout], layout, wording, TARGET).columns
    assert (made["prompt"], made["completion"]) == EXPECTED[layout, wording]


def test_text_stays_as_it_is():
    assert formats.form(ROWS["text"], "text", "as it is", TARGET).columns == {"text": "a"}


IN_CHAT = {
    **{layout: [("user", "q"), ("assistant", "a")] for layout in SINGLE},
    "alpaca": [("user", "add\n\n1 2"), ("assistant", "a")],
    "conversation": [("user", "h"), ("assistant", "r"), ("user", "q"), ("assistant", "a")],
    "task": [("user", "Summarize the text.\n\nlong"), ("assistant", "a")],
    "chain_of_thought": [("user", "q"), ("assistant", "so\n\na")],
}


@pytest.mark.parametrize("layout", IN_CHAT)
def test_every_layout_as_a_chat_gives_exactly_these_turns(layout):
    made = formats.form(ROWS[layout], layout, "chat", TARGET).columns
    messages = [(turn["role"], turn["content"]) for turn in made["prompt"] + made["completion"]]
    assert messages == IN_CHAT[layout]
    assert len(made["completion"]) == 1


@pytest.mark.parametrize("layout", ROWS)
def test_layout_is_recognised_by_its_columns(layout):
    assert formats.recognise(ROWS[layout]) == [layout]


def test_surface_lists_the_wordings_that_there_are():
    listed = sections.OWN_KEYS["data.*"]["wording"]
    assert all(f"'{name}'" in listed for name in ("chat", *TURNS, *CHATS))
    assert listed.count("'") == 2 * len(("chat", *TURNS, *CHATS))


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
    assert formats.form(row, "task", "task", TARGET).columns == {"prompt": TASKS[task], "completion": "y"}
    without = {"input": "x", "output": "y"}
    made = formats.form(without, "task", "task", TARGET._replace(task=task)).columns
    assert made == {"prompt": TASKS[task], "completion": "y"}
    asked = {"question": "x", "answer": "y"}
    made = formats.form(asked, "question_answer", "task", TARGET._replace(task=task)).columns
    assert made["prompt"] == TASKS[task]


def test_task_without_input_has_no_empty_heading():
    made = formats.form({"task": "Write a haiku.", "input": "", "output": "y"}, "task", "task", TARGET)
    assert made.columns["prompt"] == "### Task:\nWrite a haiku.\n\n### Output:\n"
    chat = formats.form({"task": "Write a haiku.", "input": "", "output": "y"}, "task", "chat", TARGET)
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
    made = formats.form({"history": history, "human": "q", "assistant": "a"}, "conversation", "chat", TARGET)
    assert [turn["content"] for turn in made.columns["prompt"]] == ["h", "r", "q"]


def test_history_as_one_text_stands_before_the_question():
    row = {"history": "H: hi\nA: hello\n", "human": "q", "assistant": "a"}
    made = formats.form(row, "conversation", "conversation", TARGET).columns
    assert made["prompt"] == "H: hi\nA: hello\n### Human: q\n### Assistant:"


def test_alpaca_rows_may_bring_a_system_prompt_and_a_history():
    """As LLaMA-Factory's data has them."""
    row = ROWS["alpaca"] | {"system": "be kind", "history": [["h", "r"]]}
    made = formats.form(row, "alpaca", "chat", TARGET).columns
    assert [turn["role"] for turn in made["prompt"]] == ["system", "user", "assistant", "user"]
    empty = ROWS["alpaca"] | {"system": "", "history": []}
    assert formats.form(empty, "alpaca", "alpaca", TARGET) == formats.form(ROWS["alpaca"], "alpaca", "alpaca", TARGET)


def test_system_prompt_takes_the_place_of_vicunas_own():
    messages = [{"role": "system", "content": "be kind"}, *ROWS["messages"]["messages"]]
    made = formats.form({"messages": messages}, "messages", "vicuna", TARGET).columns
    assert made["prompt"] == "be kind USER: q ASSISTANT:"
    with pytest.raises(data_messages.FormatError, match="takes one question and one answer, not system"):
        formats.form({"messages": messages}, "messages", "alpaca", TARGET)


def test_content_in_parts_of_text_is_one_text():
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
    made = formats.form(
        {"messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]},
        "messages",
        "chat",
        TARGET,
    )
    assert made.columns["prompt"] == [{"role": "user", "content": "q!"}]


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


def test_own_function_that_changed_is_not_answered_from_the_cache(german, here):
    def tokens(*words):
        code, out, err = german(", format: 'rows.py:text'", "run.overwrite=true", *words)
        assert code == 0, err
        return next(line for line in out.splitlines() if line.strip().startswith("tokens"))

    before = tokens()
    (here / "rows.py").write_text(FUNCTIONS.replace('" " + row', '" and so on and on " + row'))
    from trl_sft.data import conversion

    conversion.function.cache_clear()  # a new process would have none
    assert tokens() != before


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("rows.py:broken", "g.jsonl row 1\n    broken raised KeyError: 'answer'"),
        ("rows.py:number", "number returned int"),
        ("rows.py:nothing", "nothing is int, no function"),
        ("rows.py:gone", "cannot be imported: AttributeError"),
    ],
)
def test_own_function_that_fails_is_told_with_its_row(name, said, german):
    code, _, err = german(f", format: '{name}'")
    assert code == 2
    assert said in err


def test_changed_function_is_not_resumed_silently(german, here):
    assert german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")[0] == 75
    (here / "rows.py").write_text(FUNCTIONS + "\n# changed\n")
    code, _, err = german(", format: 'rows.py:chat'", "train.max_steps=4", "train.save_steps=2", "run.max_hours=1e-9")
    assert code == 2
    assert "run.allow: [changed_data]" in err


def test_task_label_of_a_source_is_said(german):
    code, out, _ = german(", rename: {frage: question, antwort: answer}, task: math")
    assert code == 0
    assert "task math" in out


def test_base_model_takes_the_layouts_own_wording_and_vicuna_when_asked(here, go):
    import models

    models.base(here / "base")
    jsonl(here / "m.jsonl", [ROWS["messages"]] * 4)
    text = "model: {name_or_path: ./base}\ndata: {train: m.jsonl}\ntrain: {output_dir: out, max_steps: 1}\n"
    code, _, err = go(text)
    assert code == 2
    assert "tokenizer.chat_template: chatml, or wording: vicuna or conversation" in err
    assert go(text, "data.train={path: m.jsonl, wording: vicuna}")[0] == 0
    assert wordings.known_task("") == ""


def test_task_of_the_source_holds_for_all_its_rows():
    made = formats.form(ROWS["task"], "task", "task", TARGET._replace(task="translation"))
    assert made.columns["prompt"] == "### Text:\nlong\n\n### Translation:\n"


@pytest.mark.parametrize("task", ["sumary", "translaton", "classificaton"])
def test_misspelt_task_is_refused_and_not_trained_as_an_instruction(task):
    with pytest.raises(data_messages.FormatError, match="is no known task"):
        formats.form(ROWS["task"] | {"task": task}, "task", "chat", TARGET)


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
def test_own_file_that_ends_or_fails_on_import_is_told(body, german, here):
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


def test_null_that_json_writes_is_trained_and_one_that_arrow_makes_is_not(here):
    import json

    from datasets import Dataset

    from trl_sft.data import conversion

    call = {"function": {"name": "f", "arguments": {"x": None, "y": 1}}}
    turns_ = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    how = conversion.SourceFormat("messages", "chat", TARGET, "r", None)
    written = Dataset.from_dict({"messages": [json.dumps(turns_)]})
    made = conversion.convert({"messages": [json.dumps(turns_)]}, [0], how, written.features)
    assert '"x": null' in made["completion"][0][0]["content"]
    padded = Dataset.from_list([{"messages": turns_}])
    made = conversion.convert({"messages": padded["messages"]}, [0], how, padded.features)
    assert '"x"' not in made["completion"][0][0]["content"]
