"""The base model's own best prompt: examples from the training rows, in the form that the base model knows.

Inputs: rows to evaluate with their prompts, examples, the tokenizers of run and base model. Outputs: token ids, where
an answer ends, and what stands beside the scores. A base model with a chat template of its own gets the examples as
turns under that template; one without gets plain text, `Question: ... Answer: ...`, as lm-eval asks base models. Not
here: which rows are examples (`prompts`).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from trl_sft.cli.evaluate import prompts
from trl_sft.cli.evaluate.prompts import Example
from trl_sft.errors import UserError
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.serving.prompts import PromptRenderer, RenderedPrompt
from trl_sft.tokenization import chat_template

QUESTION, ANSWER = "Question:", "Answer:"
NEXT_EXAMPLE = "next_example"  # why an answer ended: the base model began another example
_LEAST_PREFIX, _MOST_PREFIX = 4, 24  # characters with which worded prompts begin, that end an answer
_OWN, _RUN, _PLAIN, _WORDED = "own", "run", "plain", "worded"
_DESCRIPTIONS = {
    _OWN: "chat template of the base model",
    _RUN: "chat template of the run, which is that of the base model",
    _PLAIN: f"plain text, {QUESTION} ... {ANSWER} ...: the base model has no chat template",
    _WORDED: "wording of the run",
}


class BasePrompts(NamedTuple):
    """How the base model is asked at its best."""

    ids: list[list[int]]  # (tokens,) of each row
    end_marks: tuple[str, ...]  # an answer ends before the first of these; () = at its stop token only
    template: str  # what stands beside the scores
    examples: int  # the most that a prompt has


class BasePromptBuilder:
    """Renders prompts with examples for the base model."""

    def __init__(
        self,
        renderer: PromptRenderer,
        tokenizer: PreTrainedTokenizerBase,
        base_tokenizer: PreTrainedTokenizerBase | None,
    ) -> None:
        """Choose the form.

        Args:
            renderer: of the run.
            tokenizer: of the run, which has the base model's tokens.
            base_tokenizer: of the base model, for its chat template; None = it has none.

        """
        self.renderer, self.tokenizer = renderer, tokenizer
        self.template = chat_template.read_template(base_tokenizer) if base_tokenizer is not None else None
        if not renderer.has_history:
            self.form = _WORDED
        elif not self.template:
            self.form = _PLAIN
        else:
            self.form = _RUN if self.template == chat_template.read_template(tokenizer) else _OWN

    def build(
        self,
        asked: Sequence[EvaluationItem],
        rendered: Sequence[RenderedPrompt],
        *,
        examples: Sequence[Example],
        number: int,
        token_limit: int | None,
    ) -> BasePrompts:
        """Return the prompts of all rows.

        Args:
            asked: the rows.
            rendered: their prompts as training renders them.
            examples: training rows.
            number: examples of each prompt; fewer where they do not fit.
            token_limit: the most tokens of a prompt; None = no limit is known.

        """
        ids, most = [], 0
        for item, prompt in zip(asked, rendered, strict=True):
            row = prompt.ids
            for count in range(number, 0, -1):
                chosen = prompts.choose_examples(examples, item.task, count)
                longer = self._render(prompt.content, chosen, item.tools)
                if token_limit is None or len(longer) <= token_limit:
                    row, most = longer, max(most, len(chosen))
                    break
            ids.append(row)
        return BasePrompts(ids, self._list_end_marks(examples), _DESCRIPTIONS[self.form], most)

    def _render(self, content: Any, examples: Sequence[Example], tools: Any) -> list[int]:
        """Return the tokens of one prompt with its examples."""
        if self.form == _PLAIN:
            return list(self.tokenizer(write_plain(content, examples))["input_ids"])
        longer = prompts.add_examples(content, examples)
        if self.form == _OWN:
            try:
                text = self.tokenizer.apply_chat_template(
                    longer, tools=tools, chat_template=self.template, add_generation_prompt=True, tokenize=False
                )
                return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            except Exception:  # of the template's own code: it does not take this chat
                return list(self.tokenizer(write_plain(content, examples))["input_ids"])
        return self.renderer.render_worded(longer, tools).ids

    def _list_end_marks(self, examples: Sequence[Example]) -> tuple[str, ...]:
        """Return what ends an answer: the beginning of the next example, and a line break where no example has one."""
        if self.form in (_OWN, _RUN):
            return ()
        answers = [_read_text(example.completion).strip() for example in examples]
        marks = [] if any("\n" in answer for answer in answers) else ["\n"]
        if self.form == _PLAIN:
            return (f"\n{QUESTION}", *marks)
        first, last = min(texts := [str(example.prompt) for example in examples]), max(texts)
        equal = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
        prefix = "".join(letter for letter, _ in equal)[:_MOST_PREFIX]
        return (*([f"\n{prefix}"] if len(prefix) >= _LEAST_PREFIX else []), *marks)


def load_base_tokenizer(name: str, *, trusts_code: bool) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a base model; None = it cannot be loaded."""
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(name, trust_remote_code=trusts_code)
    except (OSError, ValueError, UserError):
        return None
    return tokenizer


def write_plain(content: Sequence[Any], examples: Sequence[Example]) -> str:
    r"""Return a chat with examples as plain text that ends where the answer begins.

    Example:
        >>> write_plain([{"role": "user", "content": "2+2?"}], [])
        'Question: 2+2?\nAnswer:'

    """
    system = [str(turn.get("content") or "") for turn in content if turn.get("role") == "system"]
    shown = [
        f"{QUESTION} {_read_text(example.prompt[-1])}\n{ANSWER} {_read_text(example.completion)}"
        for example in examples
    ]
    names = {"user": QUESTION, "assistant": ANSWER}
    turns = [
        f"{names.get(str(turn.get('role')), str(turn.get('role')) + ':')} {_read_text(turn)}"
        for turn in content
        if turn.get("role") != "system"
    ]
    return "\n\n".join([*filter(None, system), *shown, "\n".join([*turns, ANSWER])])


def cut_at_marks(text: str, marks: Sequence[str]) -> str:
    r"""Return a text up to the first mark; line breaks at its beginning do not count.

    Example:
        >>> cut_at_marks(" 4\nQuestion: 3+3?", ("\nQuestion:",))
        ' 4'

    """
    begun = text.lstrip("\n")
    places = [place for mark in marks if (place := begun.find(mark)) >= 0]
    return begun[: min(places)] if places else text


def _read_text(turn: Any) -> str:
    """Return the text of a turn, or the text itself."""
    return str(turn.get("content") or "") if isinstance(turn, dict) else str(turn)
