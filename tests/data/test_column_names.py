"""Column names that data sets of this field use become a format with the renames that it needs."""

import pytest

from trl_sft.data import column_names, formats

SUGGESTIONS = {
    ("prompt", "response"): ("prompt_completion", {"response": "completion"}),
    ("Prompt", "Completion"): ("prompt_completion", {"Prompt": "prompt", "Completion": "completion"}),
    ("Question", "Answer"): ("question_answer", {"Question": "question", "Answer": "answer"}),
    ("QUESTION ", " ANSWER"): ("question_answer", {"QUESTION ": "question", " ANSWER": "answer"}),
    ("query", "response"): ("question_answer", {"query": "question", "response": "answer"}),
    ("q", "a"): ("question_answer", {"q": "question", "a": "answer"}),
    ("input", "output"): ("question_answer", {"input": "question", "output": "answer"}),
    ("inputs", "targets"): ("question_answer", {"inputs": "question", "targets": "answer"}),
    ("问题", "答案"): ("question_answer", {"问题": "question", "答案": "answer"}),
    ("提问", "回复"): ("question_answer", {"提问": "question", "回复": "answer"}),
    ("用户问题", "模型回答"): ("question_answer", {"用户问题": "question", "模型回答": "answer"}),
    ("frage", "antwort"): ("question_answer", {"frage": "question", "antwort": "answer"}),
    ("question", "final_answer"): ("question_answer", {"final_answer": "answer"}),
    ("userMessage", "assistantMessage"): (
        "question_answer",
        {"userMessage": "question", "assistantMessage": "answer"},
    ),
    ("instruction", "response"): ("alpaca", {"response": "output"}),
    ("INSTRUCTION", "RESPONSE"): ("alpaca", {"INSTRUCTION": "instruction", "RESPONSE": "output"}),
    ("指令", "回答"): ("alpaca", {"指令": "instruction", "回答": "output"}),
    ("指令", "输入", "输出"): ("alpaca", {"指令": "instruction", "输入": "input", "输出": "output"}),
    ("instruction", "context", "response", "category"): ("alpaca", {"context": "input", "response": "output"}),
    ("context", "question", "answer"): (
        "alpaca",
        {"context": "input", "question": "instruction", "answer": "output"},
    ),
    ("system_prompt", "question", "response"): (
        "alpaca",
        {"system_prompt": "system", "question": "instruction", "response": "output"},
    ),
    ("human", "gpt"): ("conversation", {"gpt": "assistant"}),
    ("User", "Bot"): ("conversation", {"User": "human", "Bot": "assistant"}),
    ("Question", "Complex_CoT", "Response"): (
        "chain_of_thought",
        {"Question": "problem", "Complex_CoT": "reasoning", "Response": "answer"},
    ),
    ("problem", "solution", "answer"): ("chain_of_thought", {"solution": "reasoning"}),
    ("conversation", "id"): ("messages", {"conversation": "messages"}),
    ("Messages",): ("messages", {"Messages": "messages"}),
    ("对话",): ("messages", {"对话": "messages"}),
    ("content",): ("text", {"content": "text"}),
    ("Body", "title", "url"): ("text", {"Body": "text"}),
    ("正文", "标题"): ("text", {"正文": "text"}),
}


@pytest.mark.parametrize("columns", SUGGESTIONS)
def test_names_of_the_field_become_a_format_and_renames(columns):
    suggestion = column_names.suggest_format(columns)
    assert (suggestion.format, suggestion.rename) == SUGGESTIONS[columns]
    assert suggestion.is_known


@pytest.mark.parametrize("columns", SUGGESTIONS)
def test_renamed_columns_have_what_the_format_requires(columns):
    suggestion = column_names.suggest_format(columns)
    renamed = [suggestion.rename.get(column, column) for column in columns]
    assert len(set(renamed)) == len(renamed)
    assert set(formats.FORMATS[suggestion.format].columns) <= set(renamed)


@pytest.mark.parametrize("columns", [("foo", "bar"), ("prompt", "chosen", "rejected"), ("chosen", "rejected")])
def test_suggestion_that_only_a_person_can_confirm_says_so(columns):
    assert not column_names.suggest_format(columns).is_known


def test_names_that_say_nothing_get_no_suggestion():
    assert column_names.suggest_format(("a1", "b1", "c1")) is None


@pytest.mark.parametrize(
    ("columns", "target", "column"),
    [
        (("instruction", "response"), "output", "response"),
        (("Frage", "Antwort"), "answer", "Antwort"),
        (("user", "bot"), "assistant", "bot"),
        (("foo", "bar"), "answer", ""),
    ],
)
def test_column_of_a_format_is_found_under_another_name(columns, target, column):
    assert column_names.suggest_column(columns, target) == column


CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"contents": CHAT}, ("messages", {"contents": "messages"})),
        ({"thread": {"role": ["user"], "content": ["a"]}, "id": 1}, ("messages", {"thread": "messages"})),
        ({"prompt": CHAT[:1], "response": CHAT[1:]}, ("prompt_completion", {"response": "completion"})),
        ({"dialogue": "A: hi\nB: ho", "answer": "b"}, None),
    ],
)
def test_values_tell_a_chat_from_a_text(row, expected):
    suggestion = column_names.suggest_format(list(row), row)
    if expected is None:
        assert suggestion is None or suggestion.format != "messages"
    else:
        assert (suggestion.format, suggestion.rename) == expected


@pytest.mark.parametrize("columns", [("article", "highlights", "id"), ("document", "summary"), ("dialogue", "summary")])
def test_text_with_a_summary_is_not_taken_for_a_text_alone(columns):
    suggestion = column_names.suggest_format(columns, dict.fromkeys(columns, "A: hi"))
    assert suggestion.rename == {columns[0]: "question", columns[1]: "answer"}
    assert not suggestion.is_known
