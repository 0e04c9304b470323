"""How a row becomes plain text: the wordings, as functions from a turn or a chat to prompt and completion.

In: a `Turn`, or messages, and the tokenizer's end token. Out: two texts; TRL appends the end token to
the completion. Where a wording is a known format it stands as its authors wrote it, source and licence
beside it. Deliberately absent: the wording `chat`, which is the tokenizer's template.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

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


class Turn(NamedTuple):
    """One instruction, what it works on (may be empty), and the response."""

    instruction: str
    input: str
    response: str
    task: str = ""  # a key of TASKS, or any other words
    thought: str = ""  # reasoning that leads to the response
    history: str = ""  # what was said before, as one text

    @property
    def question(self) -> str:
        """The instruction and its input as one text."""
        return "\n\n".join(filter(None, (self.instruction, self.input)))

    @property
    def told(self) -> Turn:
        """The turn with its task as the beginning of the instruction, for wordings that have no place for one."""
        known = known_task(self.task)
        words = TASKS[known][1] if known else self.task
        return self._replace(instruction="\n\n".join(filter(None, (words, self.instruction))), task="")

    @property
    def answer(self) -> str:
        """The thought and the response as one text."""
        return "\n\n".join(filter(None, (self.thought, self.response)))


class Pair(NamedTuple):
    """What is given and what is learned, as texts."""

    prompt: str
    completion: str


def known_task(name: str) -> str:
    """Return the key of TASKS that a name means (question-answer, Summary); "" = none."""
    key = name.strip().lower().replace("-", "_").replace(" ", "_")
    return key if key in TASKS else ""


def check_task(name: str) -> None:
    """Refuse a word that is nearly the name of a task: as an instruction it would be trained. Raises FormatError."""
    key = name.strip().lower().replace("-", "_")
    near = nearest_name(key, TASKS, cutoff=STRICT) if " " not in key and not known_task(name) else ""
    if near:
        raise FormatError(f"task {name!r} is no known task", f"{near}, or an instruction of several words")


def _task(turn: Turn) -> Pair:
    """Word a turn by its task; a task of no known name is itself the instruction."""
    if not turn.task:
        raise FormatError("the row has no task", f"a column task, or task: in the source ({', '.join(TASKS)}, or any)")
    known = known_task(turn.task)
    prompt = TASKS[known][0] if known else _ANY_TASK if turn.question else _ANY_TASK_ALONE
    return Pair(prompt.format(task=turn.task, input=turn.question), turn.answer)


def _thinking(turn: Turn) -> Pair:
    if not turn.thought:
        raise FormatError("the row has no reasoning", "format: chain_of_thought, or another wording")
    prompt = f"### Problem:\n{turn.question}\n\n### Reasoning:\n"
    return Pair(prompt, f"{turn.thought}\n\n### Answer:\n{turn.response}")


def _with_input(plain: str, with_input: str) -> Callable[[Turn], Pair]:
    return lambda turn: Pair((with_input if turn.input else plain).format(**turn._asdict()), turn.answer)


# wordings of one question and one answer
TURNS: dict[str, Callable[[Turn], Pair]] = {
    "plain": lambda turn: Pair(turn.question, turn.answer),
    "alpaca": _with_input(_ALPACA, _ALPACA_INPUT),
    "chinese": _with_input(_CHINESE, _CHINESE_INPUT),
    "basic": _with_input(_BASIC, _BASIC_INPUT),
    "question_answer": lambda turn: Pair(f"### Question: {turn.question}\n### Answer:", f" {turn.answer}"),
    "task": _task,
    "chain_of_thought": _thinking,
}


def _vicuna(messages: Sequence[Message], _history: str, eos: str) -> Pair:
    system = messages[0]["role"] == "system"
    words = f"{messages[0]['content'] if system else _VICUNA} "
    for message in messages[system:-1]:
        asks = message["role"] == "user"
        words += f"USER: {message['content']} " if asks else f"ASSISTANT: {message['content']}{eos}"
    return Pair(f"{words}ASSISTANT:", f" {messages[-1]['content']}")


def _conversation(messages: Sequence[Message], history: str, _eos: str) -> Pair:
    names = {"system": "System", "user": "Human", "assistant": "Assistant"}
    lines = [history] if history else []
    lines += [f"### {names[message['role']]}: {message['content']}" for message in messages[:-1]]
    return Pair("\n".join([*lines, "### Assistant:"]), f" {messages[-1]['content']}")


# wordings of several turns: the messages, what was said before as one text, the end token
CHATS: dict[str, Callable[[Sequence[Message], str, str], Pair]] = {"vicuna": _vicuna, "conversation": _conversation}


def pair(read: Turn | Sequence[Message], wording: str, eos: str) -> Pair:
    """Return prompt and completion of a turn, or of messages without calls. Raises FormatError."""
    history = read.history if isinstance(read, Turn) else ""
    if wording in CHATS:
        return CHATS[wording](messages_of(read, keep_history=wording == "conversation"), history, eos)
    _no_history(history)
    turn = read if isinstance(read, Turn) else _turn(read, wording)
    return TURNS[wording](turn if wording == "task" else turn.told)


def messages_of(read: Turn | Sequence[Message], keep_history: bool = False) -> list[Message]:
    """Return a turn as a user's and an assistant's message. Raises FormatError."""
    if not isinstance(read, Turn):
        return list(read)
    if not keep_history:
        _no_history(read.history)
    return [{"role": "user", "content": read.told.question}, {"role": "assistant", "content": read.answer}]


def _no_history(history: str) -> None:
    if history:
        raise FormatError(
            "the history is one text, whose turns cannot be told apart", "a list, or wording: conversation"
        )


def _turn(messages: Sequence[Message], wording: str) -> Turn:
    """Return a chat of one question and one answer as a turn."""
    if [message["role"] for message in messages] != ["user", "assistant"]:
        found = f"wording {wording} takes one question and one answer, not {', '.join(m['role'] for m in messages)}"
        raise FormatError(found, f"wording: {', '.join(CHATS)} or chat")
    return Turn(messages[0]["content"], "", messages[1]["content"])


def fields(template: str) -> list[str]:
    """Return the columns that a wording of the recipe's own names in braces. Raises FormatError."""
    try:
        parsed = [(p[1] or "", p[2], p[3]) for p in string.Formatter().parse(template) if p[1] is not None]
    except ValueError as error:
        raise FormatError(
            f"{template!r}: {error}", "columns in braces, as in {question}; a brace itself as {{"
        ) from None
    if any(not column.isidentifier() or spec or conversion for column, spec, conversion in parsed):
        write = "columns in braces, as in {question}; one whose name is no word: rename it"
        raise FormatError(f"{template!r}: braces hold more than a column", write)
    return [column for column, _, _ in parsed]


def own(values: Mapping[str, str], templates: Mapping[str, str]) -> dict[str, Any]:
    """Return the recipe's own {prompt, completion} or {text} with a row's columns filled in."""
    return {part: template.format(**values) for part, template in templates.items()}
