"""A chat in the terminal: prompts and commands from the keyboard, answers as they are generated, the turns so far.

Inputs: a `ChatModel`, and lines of text. Outputs: the screen, and a file where `/save` names one. Not here: one prompt
for a program (`cli.chat`).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trl_sft import console, run_folder, user_paths
from trl_sft.errors import Fault, RecipeError, UserError
from trl_sft.evaluation.generate import CONTEXT, LIMIT
from trl_sft.serving.answers import (
    BASE,
    INTERRUPTED,
    TUNED,
    ChatAnswer,
    ChatModel,
    prompt_opens_thought,
)

_PROMPT = "you> "
_HELP = """\
  /system TEXT   set the system prompt and begin a new chat; /system alone removes it
  /reset         begin a new chat; the system prompt stays
  /save FILE     write the chat as JSON
  /help          show this
  /exit          end the program; Ctrl-D does too. Ctrl-C stops an answer"""


@dataclass
class Session:
    """A chat with a model.

    Attributes:
        chat: the model.
        compares_base: whether the base model answers each prompt too.
        system: the system prompt; "" = none.
        history: turns that the next prompt follows, without the system prompt and without thoughts.
        turns: all turns of the chat with what `/save` writes.

    """

    chat: ChatModel
    compares_base: bool
    system: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    turns: list[dict[str, Any]] = field(default_factory=list)

    def run(self, read_line: Callable[[str], str]) -> None:
        """Answer until the user ends the chat. `read_line` gets the text before the cursor and raises EOFError."""
        console.say("Write a prompt and press Enter; /help lists the commands, Ctrl-D ends.")
        is_open = True
        while is_open:
            try:
                is_open = self._take_line(read_line)
            except KeyboardInterrupt:  # at the prompt, or a second one while an answer stops
                console.say("\nCtrl-D or /exit ends the program.")

    def ask(self, text: str) -> ChatAnswer:
        """Show the answer to a prompt, and the base model's; remember the turn. Raises DataError."""
        prompt = self.chat.renderer.render(text, system=self.system, history=self.history)
        answer = self._show_answer(prompt, TUNED)
        base = None
        if self.compares_base and answer.stop_reason != INTERRUPTED:
            base = self._show_answer(prompt, BASE)
        turn = {"prompt": text, **describe_answer(answer, prompt_tokens=len(prompt.ids))}
        self.turns.append(turn | ({"base": describe_answer(base)} if base else {}))
        if self.chat.renderer.has_history and answer.text.strip():
            self.history += [prompt.content[-1], {"role": "assistant", "content": answer.text}]
        elif self.chat.renderer.has_history:
            console.say("  the answer is empty: the next prompt does not follow this turn")
        return answer

    def _take_line(self, read_line: Callable[[str], str]) -> bool:
        """Read a line and carry it out; tell whether the chat goes on."""
        try:
            line = read_line(_PROMPT)
        except EOFError:
            console.say()
            return False
        if line.strip() == "/exit":
            return False
        try:
            self._take(line)
        except UserError as error:
            for fault in error.faults:
                console.say(f"  {fault.problem}. {fault.fix}")
        return True

    def _take(self, line: str) -> None:
        """Carry out a command, or answer a prompt."""
        word, _, rest = line.strip().partition(" ")
        if not word:
            return
        if word == "/help":
            for text in _HELP.splitlines():
                console.say(text)
        elif word == "/reset":
            self._begin()
            console.say("  a new chat begins")
        elif word == "/system":
            self._set_system(rest.strip())
        elif word == "/save":
            self._save(rest.strip())
        elif word.startswith("/") and word[1:].isalpha():
            fault = Fault(word, f"{word} is no command", "Write /help for the commands.", code="run.unknown_command")
            raise RecipeError(fault)
        else:
            self.ask(line)

    def _begin(self) -> None:
        """Forget the turns of the chat."""
        self.history.clear()
        self.turns.clear()

    def _set_system(self, text: str) -> None:
        """Set the system prompt, once the renderer has taken it, and begin a new chat. Raises DataError."""
        if text:
            self.chat.renderer.render("-", system=text)
        self.system = text
        self._begin()
        console.say("  a new chat begins with this system prompt" if text else "  a new chat begins, no system prompt")

    def _save(self, name: str) -> None:
        """Write the chat into a file. Raises RecipeError."""
        if not name:
            fix = "Write the name of a file: /save chat.json."
            raise RecipeError(Fault("/save", "/save names no file", fix, code="run.bad_option"))
        path = Path(name).expanduser()
        user_paths.check("/save", path, user_paths.FILE, is_output=True)
        if path.exists():
            problem, fix = f"{name} exists", "Name another file."
            raise RecipeError(Fault("/save", problem, fix, code="run.file_exists"))
        content: dict[str, Any] = {"model": str(self.chat.source.folder), "step": self.chat.source.step}
        content |= {"system": self.system or None, "turns": self.turns}
        try:
            run_folder.write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        except OSError as error:
            problem, fix = f"{name}: {error.strerror or error}", "Name a file that can be written."
            raise RecipeError(Fault("/save", problem, fix, code="run.unwritable_output")) from None
        console.say(f"  wrote {name}: {len(self.turns)} turn{'s' * (len(self.turns) != 1)}")

    def _show_answer(self, prompt: Any, side: str) -> ChatAnswer:
        """Show an answer while it is generated, and why it ended where the model did not end it."""
        screen = _AnswerScreen(side, self.chat, is_open=prompt_opens_thought(self.chat, prompt))
        answer = self.chat.answer(prompt, side=side, show=screen.show)
        screen.close()
        console.say()
        if answer.stop_reason == LIMIT:
            console.say(f"  cut after {len(answer.tokens):,} tokens: --max-new-tokens raises the limit")
        elif answer.stop_reason == CONTEXT:
            console.say("  cut: the context of the model is full. /reset begins a new chat")
        elif answer.stop_reason == INTERRUPTED:
            console.say("  stopped by Ctrl-C")
        return answer


class _AnswerScreen:
    """Shows the parts of an answer; what stands between the marks of a thought is shown as thought."""

    def __init__(self, side: str, chat: ChatModel, *, is_open: bool) -> None:
        """Show who answers. `is_open`: the prompt has begun a thought."""
        marks = chat.thoughts
        self._opening, self._closing = (marks.opening, marks.closing) if marks else ("", "")
        self._side, self._waiting = side, ""
        self._phase = "thought" if is_open else "begin" if self._opening and self._closing else "answer"
        console.say_part(f"{side} thinks> " if is_open else f"{side}> ")

    def show(self, part: str) -> None:
        """Show the next part."""
        if self._phase == "answer":
            console.say_part(part)
            return
        self._waiting += part
        if self._phase == "begin":
            begun = self._waiting.lstrip()
            if begun.startswith(self._opening):
                self._phase, self._waiting = "thought", begun[len(self._opening) :]
                console.say_part("(thinks) ")
            elif not self._opening.startswith(begun):
                self._phase = "answer"
                self.close()
                return
        if self._phase == "thought":
            self._show_thought()

    def close(self) -> None:
        """Show what was held back."""
        console.say_part(self._waiting)
        self._waiting = ""

    def _show_thought(self) -> None:
        """Show a thought up to its closing mark, of which a beginning is held back."""
        thought, closing, rest = self._waiting.partition(self._closing)
        if closing:
            console.say_part(thought.rstrip())
            console.say()
            console.say_part(f"{self._side}> ")
            self._phase, self._waiting = "answer", ""
            console.say_part(rest.lstrip())
            return
        lengths = range(min(len(self._closing), len(thought)), 0, -1)
        kept = next((length for length in lengths if self._closing.startswith(thought[-length:])), 0)
        console.say_part(thought[: len(thought) - kept])
        self._waiting = thought[len(thought) - kept :]


def describe_answer(answer: ChatAnswer, **values: Any) -> dict[str, Any]:
    """Return an answer as a mapping for JSON; `values` stand before it."""
    return {
        **values,
        "answer": answer.text,
        "thought": answer.thought or None,
        "stop_reason": answer.stop_reason,
        "tokens": len(answer.tokens),
        "seconds": round(answer.seconds, 3),
    }


def read_line(prompt: str) -> str:
    """Return a line from the keyboard, with editing and earlier lines where the system has readline. Raises EOFError.

    The text before the cursor is printed by readline, so that a long line is redrawn rightly.
    """
    with contextlib.suppress(ImportError):  # not there on Windows
        import readline  # noqa: F401, PLC0415
    return input(prompt)
