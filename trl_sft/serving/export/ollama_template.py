"""The template of Ollama that renders what the chat template of the run renders.

Inputs: what renders the prompts of a run. Outputs: a template in Go's language, proved equal on many chats, or a
refusal with the first difference. The parts of the template are found by trial: chats with marked words are rendered,
and what stands between the words is what the template writes. Deliberately not here: the Modelfile (`ollama_export`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple, NoReturn

from trl_sft.data.formats import CHAT
from trl_sft.errors import Fault, TemplateError, first_line
from trl_sft.serving.export import go_template
from trl_sft.serving.prompts import PromptRenderer

Messages = Sequence[dict[str, str]]
_WORDS = {"system": "Sy7qsystem", "user": "Us7q{}user", "assistant": "As7q{}answer"}
_LAST = "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
_TEXTS = (
    ("Hello", "Hi! How can I help?"),
    ("What is 2 + 2?\nAnswer in one word.", "Four."),
    ("你好，世界！\n\n第二段。", "你好！😀"),
    ('Say "{{ .Prompt }}" and {% raw %} \\n <b>&amp;</b>', "```python\nprint('{x}')\n```\n\n- done"),
    ("a  b\tc", "1\n2\n\n3"),
)
_SYSTEMS = ("", "You are a helpful assistant.", "Réponds en français.\nNever say {{ no }}.")
_TURNS = (1, 2, 3, 4)
_SPACES = ("  two spaces before", "a line break after\n")


class _Parts(NamedTuple):
    """What the chat template writes between the contents of turns."""

    before_user: str  # without a system prompt: what stands before the first turn
    before_system: str | None  # None = the template takes no system prompt
    after_system: str
    after_last_user: str  # the generation prompt is in it
    after_user: str  # before an answer of the history
    after_assistant: str  # before the next turn
    has_history: bool


@dataclass(frozen=True)
class OllamaTemplate:
    """A template that was compared.

    Attributes:
        text: in Go's language, without the BOS token, which Ollama adds.
        chats: how many were rendered alike.
        notes: what the comparison leaves out, as sentences.

    """

    text: str
    chats: int
    notes: tuple[str, ...]

    def describe(self) -> dict[str, Any]:
        """Return the comparison for export.json."""
        return {"equal_chats": self.chats, "notes": list(self.notes)}


def build(
    renderer: PromptRenderer, kwargs: dict[str, Any], samples: Sequence[Messages], *, bos: str, where: str
) -> OllamaTemplate:
    """Return the template of a run.

    Args:
        renderer: Renders the prompts of the run.
        kwargs: What its chat template gets beside the messages.
        samples: Prompts of the run, which have to be rendered alike too.
        bos: The BOS token with which prompts begin; "" = they do not.
        where: The place that a refusal names.

    Raises:
        TemplateError: Ollama cannot render what the run renders.

    """
    if renderer.row_type == CHAT:
        tokenizer = renderer.encoder.tokenizer

        def render(messages: Messages) -> str:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True, **kwargs)
            return str(text).removeprefix(bos)

        parts = _find_parts(render, where)
        template = _write(parts)
        chats = [chat for chat in _list_chats() if _has_place(chat, parts)]
    else:

        def render(messages: Messages) -> str:
            ids = renderer.render(messages[-1]["content"]).ids
            return str(renderer.encoder.tokenizer.decode(ids)).removeprefix(bos)

        before, _, after = render([{"role": "user", "content": _WORDS["user"]}]).partition(_WORDS["user"])
        body = f"{go_template.write_literal(before)}{{{{ $m.Content }}}}{go_template.write_literal(after)}"
        template = f"{{{{ range $i, $m := .Messages }}}}{_LAST}{{{{ if $last }}}}{body}{{{{ end }}}}{{{{ end }}}}"
        parts = None
        chats = [[{"role": "user", "content": text}] for text, _ in _TEXTS]
    chats += [list(sample) for sample in samples if all(turn["content"] == turn["content"].strip() for turn in sample)]
    for chat in chats:
        _compare(template, chat, render, where=where)
    return OllamaTemplate(template, len(chats), _list_notes(template, parts, render))


def _find_parts(render: Callable[[Messages], str], where: str) -> _Parts:
    """Return what the template writes between the turns. Raises TemplateError if it cannot be told."""
    single = _split(render, _make_chat(1), where)
    try:
        with_system = _split(render, _make_chat(1, system=True), where)
    except TemplateError:  # Gemma's raises, and others write it into the turn of the user or not at all
        with_system = None
    try:
        history = _split(render, _make_chat(2), where)
    except TemplateError:
        history = None
    return _Parts(
        before_user=single[0],
        before_system=with_system[0] if with_system else None,
        after_system=with_system[1] if with_system else "",
        after_last_user=single[1],
        after_user=history[1] if history else "",
        after_assistant=history[2] if history else "",
        has_history=history is not None,
    )


def _make_chat(turns: int, *, system: bool = False) -> list[dict[str, str]]:
    """Return a chat of marked words that ends with a turn of the user."""
    chat = [{"role": "system", "content": _WORDS["system"]}] if system else []
    for number in range(turns):
        chat.append({"role": "user", "content": _WORDS["user"].format(number)})
        if number < turns - 1:
            chat.append({"role": "assistant", "content": _WORDS["assistant"].format(number)})
    return chat


def _split(render: Callable[[Messages], str], chat: Messages, where: str) -> list[str]:
    """Return the texts around the contents of a rendered chat. Raises TemplateError if a content is not there once."""
    try:
        rest = render(chat)
    except Exception as error:  # of the template's own code
        _refuse(where, f"the chat template does not render a chat: {first_line(error)}")
    parts = []
    for turn in chat:
        before, found, rest = rest.partition(turn["content"])
        if not found or turn["content"] in rest:
            _refuse(where, f"the chat template does not write the turn of the {turn['role']} once")
        parts.append(before)
    return [*parts, rest]


def _write(parts: _Parts) -> str:
    """Return the template in Go's language."""
    literal = go_template.write_literal
    head = literal(parts.before_user)
    if parts.before_system is not None:
        system = f"{literal(parts.before_system)}{{{{ .System }}}}{literal(parts.after_system)}"
        head = f"{{{{ if .System }}}}{system}{{{{ else }}}}{head}{{{{ end }}}}"
    last = literal(parts.after_last_user)
    user = f"{{{{ if $last }}}}{last}{{{{ else }}}}{literal(parts.after_user)}{{{{ end }}}}"
    assistant = f"{{{{ if not $last }}}}{literal(parts.after_assistant)}{{{{ end }}}}"
    return (
        f'{head}{{{{ range $i, $m := .Messages }}}}{_LAST}{{{{ if eq $m.Role "user" }}}}{{{{ $m.Content }}}}{user}'
        f'{{{{ else if eq $m.Role "assistant" }}}}{{{{ $m.Content }}}}{assistant}{{{{ end }}}}{{{{ end }}}}'
    )


def _list_chats() -> list[list[dict[str, str]]]:
    """Return chats with and without a system prompt, of one to four turns, with texts of many kinds."""
    chats = []
    for system, turns, first in product(_SYSTEMS, _TURNS, range(len(_TEXTS))):
        chat = [{"role": "system", "content": system}] if system else []
        for number in range(turns):
            user, assistant = _TEXTS[(first + number) % len(_TEXTS)]
            chat.append({"role": "user", "content": user})
            if number < turns - 1:
                chat.append({"role": "assistant", "content": assistant})
        chats.append(chat)
    return chats


def _has_place(chat: Messages, parts: _Parts) -> bool:
    """Tell whether the chat template of the run renders this kind of chat at all."""
    has_system = chat[0]["role"] == "system"
    return (not has_system or parts.before_system is not None) and (parts.has_history or len(chat) <= 1 + has_system)


def _compare(template: str, chat: Messages, render: Callable[[Messages], str], *, where: str) -> None:
    """Raise TemplateError if Ollama renders a chat otherwise than the run does."""
    expected, text = render(chat), go_template.render(template, chat)
    if text == expected:
        return
    pairs = enumerate(zip(text, expected, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(text), len(expected)))
    ours, ollamas = (value[max(place - 20, 0) : place + 20] for value in (expected, text))
    roles = ", ".join(turn["role"] for turn in chat)
    problem = f"a template of Ollama cannot render what the chat template does: of a chat of {roles}, at character "
    _refuse(where, f"{problem}{place + 1}, it writes {ollamas!r} and not {ours!r}")


def _list_notes(template: str, parts: _Parts | None, render: Callable[[Messages], str]) -> tuple[str, ...]:
    """Return what Ollama renders otherwise, or what was not compared."""
    notes = ["tools and images are not rendered"]
    if parts is None:
        return ("each prompt stands alone: the wording of the run has no earlier turns", *notes)
    if parts.before_system is None:
        notes.append("system prompts are left out: the chat template takes none")
    if not parts.has_history:
        notes.append("earlier turns were not compared: the chat template takes none")
    for text in _SPACES:
        chat = [{"role": "user", "content": text}]
        if render(chat) != go_template.render(template, chat):
            notes.append("white space around a message stays: the chat template removes it, and Ollama's cannot")
            break
    return tuple(notes)


def _refuse(where: str, problem: str) -> NoReturn:
    """Raise TemplateError for a chat template that Ollama cannot render."""
    fix = "Leave out `ollama`; `llama-server --jinja` renders the chat template in the GGUF file itself."
    raise TemplateError(Fault(where, problem, fix, code="export.unsupported_template"))
