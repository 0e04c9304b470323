"""The wordings: how a row becomes plain text, as pure functions to prompt and completion.

Inputs: a `SingleTurn`, or messages, and the tokenizer's end-of-sequence token. Outputs: two texts; TRL appends the
end-of-sequence token to the completion. A wording that is a known format stands as its authors wrote it, with its
source and licence. Deliberately not here: the wording `chat`, which is the tokenizer's chat template.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from trl_sft.data.messages import FormatError, Message
from trl_sft.suggestions import STRICT, nearest_name

# https://github.com/tatsu-lab/stanford_alpaca/blob/main/train.py, PROMPT_DICT, Apache-2.0, as it is
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request."
    "\n\n### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# Alpaca's format (Apache-2.0) in Chinese, as models were trained with it:
# https://github.com/ZNLP/BigTranslate/blob/main/model/translate.py
_CHINESE = "以下是一个描述任务的指令，请写一个完成该指令的适当回复。\n\n### 指令:\n{instruction}\n\n### 回复:"
_CHINESE_INPUT = (
    "以下是一个描述任务的指令，并配有一个提供详细上下文信息的输入。请写一个完成该指令的适当回复。"
    "\n\n### 指令:\n{instruction}\n\n### 输入:\n{input}\n\n### 回复:"
)
# https://github.com/lm-sys/FastChat/blob/main/fastchat/conversation.py, vicuna_v1.1, Apache-2.0, as it is
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
_BASIC = "### Instruction:\n{instruction}\n\n### Response:\n"
_BASIC_INPUT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"

# task -> its prompt where the wording is `task`, and the instruction that stands before the input in a chat
TASKS = {
    "question_answer": ("### Question:\n{input}\n\n### Answer:\n", "Answer the question."),
    "summary": ("### Text:\n{input}\n\n### Summary:\n", "Summarize the text."),
    "translation": ("### Text:\n{input}\n\n### Translation:\n", "Translate the text."),
    "classification": ("### Text:\n{input}\n\n### Class:\n", "Classify the text."),
    "generation": ("### Prompt:\n{input}\n\n### Text:\n", "Write a text."),
}
_ANY_TASK = "### Task:\n{task}\n\n### Input:\n{input}\n\n### Output:\n"
_ANY_TASK_ALONE = "### Task:\n{task}\n\n### Output:\n"


class SingleTurn(NamedTuple):
    """An instruction, the input that it works on (may be empty), and the response."""

    instruction: str
    input: str
    response: str
    task: str = ""  # a key of TASKS, or an instruction in other words; "" = none
    reasoning: str = ""  # leads to the response; "" = none
    history: str = ""  # the earlier turns, as one text; "" = none

    @property
    def question(self) -> str:
        """The instruction and its input as one text."""
        return "\n\n".join(filter(None, (self.instruction, self.input)))

    @property
    def answer(self) -> str:
        """The reasoning and the response as one text."""
        return "\n\n".join(filter(None, (self.reasoning, self.response)))

    def with_task_as_instruction(self) -> SingleTurn:
        """Return the turn with its task as the beginning of the instruction, for wordings without a place for it."""
        name = find_task(self.task)
        task = TASKS[name][1] if name else self.task
        return self._replace(instruction="\n\n".join(filter(None, (task, self.instruction))), task="")


class PromptCompletion(NamedTuple):
    """The text before the response, and the response, which carries the loss."""

    prompt: str
    completion: str


def find_task(name: str) -> str:
    """Return the key of TASKS that a name means (question-answer, Summary); "" = none."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    return key if key in TASKS else ""


def check_task(name: str) -> None:
    """Refuse a misspelt name of a task, which would be trained as an instruction. Raises FormatError."""
    if find_task(name) or " " in name.strip():
        return
    nearest = nearest_name(name.strip().lower().replace("-", "_"), TASKS, cutoff=STRICT)
    if nearest:
        fix = f"Did you mean `{nearest}`? An instruction needs several words."
        raise FormatError(f"task {name!r} is not a known task", fix, code="data.unknown_task")


def _write_task(turn: SingleTurn) -> PromptCompletion:
    """Write a turn in the form of its task; a task without a known name is itself the instruction."""
    if not turn.task:
        fix = f"Add a column `task`, or set `task` in the source: {', '.join(TASKS)}, or an instruction."
        raise FormatError("the row has no task", fix, code="data.unknown_task")
    template = _ANY_TASK if turn.question else _ANY_TASK_ALONE
    if name := find_task(turn.task):
        template = TASKS[name][0]
    return PromptCompletion(template.format(task=turn.task, input=turn.question), turn.answer)


def _write_chain_of_thought(turn: SingleTurn) -> PromptCompletion:
    """Write a turn as problem, reasoning and answer."""
    if not turn.reasoning:
        raise FormatError(
            "the row has no reasoning",
            "Set `format: chain_of_thought`, or choose another wording.",
            code="data.wording_mismatch",
        )
    prompt = f"### Problem:\n{turn.question}\n\n### Reasoning:\n"
    return PromptCompletion(prompt, f"{turn.reasoning}\n\n### Answer:\n{turn.response}")


def _fill(without_input: str, with_input: str) -> Callable[[SingleTurn], PromptCompletion]:
    """Return the wording that fills one of two templates, by whether a turn has an input."""

    def word(turn: SingleTurn) -> PromptCompletion:
        template = with_input if turn.input else without_input
        return PromptCompletion(template.format(instruction=turn.instruction, input=turn.input), turn.answer)

    return word


# wordings of one question and one answer
SINGLE_TURN: dict[str, Callable[[SingleTurn], PromptCompletion]] = {
    "plain": lambda turn: PromptCompletion(turn.question, turn.answer),
    "alpaca": _fill(_ALPACA, _ALPACA_INPUT),
    "chinese": _fill(_CHINESE, _CHINESE_INPUT),
    "basic": _fill(_BASIC, _BASIC_INPUT),
    "question_answer": lambda turn: PromptCompletion(f"### Question: {turn.question}\n### Answer:", f" {turn.answer}"),
    "task": _write_task,
    "chain_of_thought": _write_chain_of_thought,
}


def _write_vicuna(messages: Sequence[Message], _history: str, eos_token: str) -> PromptCompletion:
    """Write a chat in the form of Vicuna 1.1: an end-of-sequence token after each earlier answer."""
    has_system = messages[0]["role"] == "system"
    prompt = f"{messages[0]['content'] if has_system else _VICUNA} "
    for message in messages[has_system:-1]:
        if message["role"] == "user":
            prompt += f"USER: {message['content']} "
        else:
            prompt += f"ASSISTANT: {message['content']}{eos_token}"
    return PromptCompletion(f"{prompt}ASSISTANT:", f" {messages[-1]['content']}")


def _write_conversation(messages: Sequence[Message], history: str, _eos_token: str) -> PromptCompletion:
    """Write a chat as lines of System, Human and Assistant, after the history as one text."""
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    lines = [history] if history else []
    lines += [f"### {names[message['role']]}: {message['content']}" for message in messages[:-1]]
    return PromptCompletion("\n".join([*lines, "### Assistant:"]), f" {messages[-1]['content']}")


# wordings of several turns: functions of the messages, the history as one text, and the end-of-sequence token
MULTI_TURN: dict[str, Callable[[Sequence[Message], str, str], PromptCompletion]] = {
    "vicuna": _write_vicuna,
    "conversation": _write_conversation,
}


def apply_wording(row: SingleTurn | Sequence[Message], wording: str, eos_token: str) -> PromptCompletion:
    """Write a row as prompt and completion in a wording.

    Args:
        row: a single turn, or the messages of a chat without tool calls.
        wording: a key of `SINGLE_TURN` or `MULTI_TURN`.
        eos_token: the tokenizer's end-of-sequence token.

    Raises:
        FormatError: the wording has no place for what the row holds.

    """
    history = row.history if isinstance(row, SingleTurn) else ""
    if wording in MULTI_TURN:
        messages = to_messages(row, allow_history=wording == "conversation")
        return MULTI_TURN[wording](messages, history, eos_token)
    _refuse_history(history)
    turn = row if isinstance(row, SingleTurn) else _to_single_turn(row, wording)
    return SINGLE_TURN[wording](turn if wording == "task" else turn.with_task_as_instruction())


def to_messages(row: SingleTurn | Sequence[Message], *, allow_history: bool = False) -> list[Message]:
    """Return a single turn as a user's and an assistant's message, and messages as they are. Raises FormatError.

    Args:
        row: a single turn, or messages.
        allow_history: whether the turn may have a history as one text, which becomes no message.

    """
    if not isinstance(row, SingleTurn):
        return list(row)
    if not allow_history:
        _refuse_history(row.history)
    question = row.with_task_as_instruction().question
    return [{"role": "user", "content": question}, {"role": "assistant", "content": row.answer}]


def _refuse_history(history: str) -> None:
    """Refuse a history that is one text. Raises FormatError."""
    if history:
        fix = "Write the history as a list, or set `wording: conversation`."
        raise FormatError("the history is one text, so its turns are unknown", fix, code="data.wording_mismatch")


def _to_single_turn(messages: Sequence[Message], wording: str) -> SingleTurn:
    """Return a chat of one question and one answer as a single turn. Raises FormatError."""
    roles = [message["role"] for message in messages]
    if roles != ["user", "assistant"]:
        problem = f"wording {wording} takes one question and one answer, not {', '.join(roles)}"
        raise FormatError(problem, f"Set `wording` to {', '.join(MULTI_TURN)} or chat.", code="data.wording_mismatch")
    return SingleTurn(messages[0]["content"], "", messages[1]["content"])


def template_columns(template: str) -> list[str]:
    """Return the columns in braces of a wording that the recipe itself writes. Raises FormatError."""
    try:
        fields = list(string.Formatter().parse(template))
    except ValueError as error:
        fix = "Write columns in braces, as in {question}, and a literal brace as {{."
        raise FormatError(f"{template!r}: {error}", fix, code="data.invalid_wording") from None
    columns = []
    for _, column, spec, conversion in fields:
        if column is None:  # the text after the last brace
            continue
        if not column.isidentifier() or spec or conversion:
            fix = "Write one column per pair of braces, as in {question}; rename a column that is not one word."
            raise FormatError(f"{template!r}: braces hold more than a column", fix, code="data.invalid_wording")
        columns.append(column)
    return columns


def fill_templates(row: Mapping[str, str], templates: Mapping[str, str]) -> dict[str, str]:
    """Return the recipe's own {prompt, completion} or {text}, filled with a row's columns."""
    return {name: template.format(**row) for name, template in templates.items()}
