"""Every format in every wording that fits it: the exact prompt and completion, or the reason why not."""

import pytest

from trl_sft.data import formats, turn_shapes, wordings
from trl_sft.data import messages as data_messages
from trl_sft.data.formats import FORMATS, TokenizerFeatures
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


@pytest.mark.parametrize(("name", "role"), list(turn_shapes.ROLES.items()))
def test_every_name_of_a_role_is_read_as_one_of_four(name, role):
    assert role in {"system", "user", "assistant", "tool"}
    content = '{"name": "f"}' if name == "function_call" else "x"
    for turn in ({"role": name, "content": content}, {"from": name, "value": content}):
        assert data_messages.read_messages({"turns": [turn]}, "turns")[0]["role"] == role


def test_task_of_the_source_holds_for_all_its_rows():
    formatted = format_row(ROWS["task"], "task", "task", task="translation")
    assert formatted.columns["prompt"] == "### Text:\nlong\n\n### Translation:\n"


@pytest.mark.parametrize("task", ["sumary", "translaton", "classificaton"])
def test_misspelt_task_is_refused_and_not_trained_as_an_instruction(task):
    with pytest.raises(data_messages.FormatError, match="is not a known task"):
        format_row(ROWS["task"] | {"task": task}, "task", "chat")


def test_no_task_is_no_known_task():
    assert wordings.find_task("") == ""
