"""The prompts of a proof: held-out prompts of the run, and those of its first training rows.

Inputs: a run folder and what renders its prompts. Outputs: prompts with the tokens that training gives them, and notes
on what was not there. Held-out prompts come from samples.jsonl. Training rows come from the data files of
resolved.yaml if these are unchanged, else from rows.jsonl. No code of a recipe runs here. Not here: answers.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trl_sft import file_digests, run_folder
from trl_sft.data import rows as data_rows
from trl_sft.data.formats import CHAT, TEXT
from trl_sft.data.formatted_columns import read_row
from trl_sft.data.messages import unescape
from trl_sft.errors import UserError, first_line
from trl_sft.recipe import build, resolved
from trl_sft.recipe.checked import Run
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import PromptRenderer
from trl_sft.tokenization import encode

HELD_OUT, TRAINING, OWN = "held_out", "training", "own"
MOST_HELD_OUT, MOST_TRAINING = 50, 20
_TEXT_CHARACTERS = 200  # of a row of plain text, which has no prompt: its beginning is one
_MOST_BYTES = 2**26  # of data files that are read as a whole, to know which rows eval_fraction holds out
_OWN_PROMPTS = ("What is 2 plus 2?", "Write one sentence about the sea.", "请介绍一下你自己。", "Name three colours.")


@dataclass(frozen=True)
class ProofPrompt:
    """One prompt of a proof.

    Attributes:
        kind: HELD_OUT, TRAINING or OWN.
        content: a text, or messages.
        tools: of the chat; None = none.
        ids: the tokens that training renders: (tokens,).
        is_rendered: whether `content` is what the chat template has rendered already, so that only its tokens compare.

    """

    kind: str
    content: Any
    tools: list[Any] | None
    ids: list[int]
    is_rendered: bool = False


@dataclass(frozen=True)
class RunPrompts:
    """The prompts of a proof, and what could not be had."""

    prompts: list[ProofPrompt]
    notes: list[str]

    def count(self, kind: str) -> int:
        """Return how many prompts are of a kind."""
        return sum(prompt.kind == kind for prompt in self.prompts)


def collect(source: ModelFolder, renderer: PromptRenderer) -> RunPrompts:
    """Return the prompts of a run: 50 held-out ones and those of its first 20 training rows.

    Args:
        source: the run folder; a folder of a model alone has neither.
        renderer: renders prompts as training does.

    """
    collector = _Collector(source.folder, renderer)
    collector.add_samples()
    if not collector.add_rows_of_recipe():
        collector.add_recorded_rows()
    if all(prompt.is_rendered for prompt in collector.prompts):
        collector.add_own()
    elif renderer.row_type != CHAT:
        collector.add_chats()
    collector.add_notes()
    return RunPrompts(collector.prompts, collector.notes)


class _Collector:
    """Collects prompts, each once."""

    def __init__(self, folder: Path, renderer: PromptRenderer) -> None:
        """Take the run folder and the renderer."""
        self.prompts: list[ProofPrompt] = []
        self.notes: list[str] = []
        self._folder, self._renderer = folder, renderer
        self._contents: set[str] = set()
        self._escaped = 0

    def add_samples(self) -> None:
        """Add the held-out prompts that base and tuned model answered in training."""
        for sample in run_folder.read_first_lines(self._folder / run_folder.SAMPLES, MOST_HELD_OUT):
            if isinstance(prompt := sample.get("prompt"), str | list):
                self._add(HELD_OUT, prompt)

    def add_rows_of_recipe(self) -> bool:
        """Add the prompts of the first training rows, and of held-out rows where samples.jsonl has none.

        Returns:
            Whether the rows could be read again.

        """
        path = self._folder / run_folder.RESOLVED
        if not path.is_file():
            return False
        try:
            run = build.load_run(path)
            reason = self._find_change([source for part in run.sources.values() for source in part])
            needs_all = bool(run.data.get("eval_fraction")) or not self.prompts  # to know which rows are held out
            head = None if needs_all and _count_bytes(run) <= _MOST_BYTES else MOST_TRAINING
            rows = None if reason else data_rows.load(run, self._renderer.source_format.features, head)
        except UserError as error:
            reason, rows = error.faults[0].problem, None
        except Exception as error:  # of files, the hub and the libraries that read them
            reason, rows = first_line(error), None
        if rows is None or rows.row_type != self._renderer.row_type:
            reason = reason or f"they are {rows.row_type if rows else ''} now"
            self.notes.append(f"the training rows of the recipe cannot be used ({reason.rstrip('.')})")
            return False
        if head is not None and run.data.get("eval_fraction"):
            self.notes.append("the training rows are the first of large files, of which eval_fraction holds some out")
        eval_rows = None if self.prompts else rows.eval_rows
        for number in range(min(MOST_HELD_OUT, len(eval_rows) if eval_rows is not None else 0)):
            self._add_row(HELD_OUT, read_row(eval_rows, number))
        for number in rows.train.order[:MOST_TRAINING]:
            self._add_row(TRAINING, read_row(rows.train.rows, int(number)))
        return self._count(TRAINING) > 0

    def add_recorded_rows(self) -> None:
        """Add the beginnings of the training rows that rows.jsonl shows, up to the first token with loss."""
        before = len(self.prompts)
        for line in run_folder.read_first_lines(self._folder / run_folder.ROWS, MOST_TRAINING):
            text = ""
            for segment in line.get("segments") or ():
                if segment[1] and text:
                    break
                text += str(segment[0])
            if text:
                self._add(TRAINING, text, is_rendered=self._renderer.row_type == CHAT)
        number = len(self.prompts) - before
        self.notes.append(f"{number} training rows are those of {run_folder.ROWS}" if number else "no training rows")

    def add_own(self) -> None:
        """Add a few prompts that are not the run's."""
        reason = "the prompts of the run are rendered already" if self.prompts else "the folder has no prompts of a run"
        self.notes.append(f"{reason}, so a few fixed ones are used")
        for text in _OWN_PROMPTS:
            rendered = self._renderer.render(text)
            self.prompts.append(ProofPrompt(OWN, rendered.content, None, rendered.ids))

    def add_chats(self) -> None:
        """Add fixed prompts as chats of one turn: the template of the export writes the wording around them."""
        for text in _OWN_PROMPTS:
            chat = [{"role": "user", "content": text}]
            self.prompts.append(ProofPrompt(OWN, chat, None, self._renderer.render(text).ids))

    def add_notes(self) -> None:
        """Add the notes on what is missing among the prompts."""
        if not self._count(HELD_OUT):
            self.notes.append(f"no held-out prompts: neither {run_folder.SAMPLES} nor the recipe has any")
        if self._escaped:
            self.notes.append(
                f"{self._escaped} prompts with the text of a special token, which is plain text, left out"
            )

    def _find_change(self, sources: list[Any]) -> str:
        """Return why the rows of the recipe are not those of the training, or are not to be read; "" = they are."""
        if any(source.function for source in sources):
            return "a Python function of the recipe formats them, which an export does not run"
        hashes = run_folder.read_json(self._folder / run_folder.RUN).get("data") or {}
        for name, digest in hashes.items():
            path = Path(name)
            if not path.is_file():
                return f"{name} is gone"
            if file_digests.hash_file(path) != digest:
                return f"{name} has changed since the training"
        return ""

    def _add_row(self, kind: str, row: dict[str, Any]) -> None:
        """Add the prompt of a formatted row."""
        if self._renderer.row_type == TEXT:  # it has no prompt
            self._add(kind, unescape(row["text"])[:_TEXT_CHARACTERS])
        else:
            self._add(kind, unescape(row["prompt"]), row.get("tools"))

    def _add(self, kind: str, content: Any, tools: Any = None, *, is_rendered: bool = False) -> None:
        """Add a prompt with its tokens, unless it is there or holds the text of a special token."""
        key = json.dumps([content, tools], ensure_ascii=False, sort_keys=True)
        features = self._renderer.source_format.features
        if key in self._contents or not content:
            return
        self._contents.add(key)
        if features.escape_special_tokens and any(token in key for token in features.special_tokens):
            self._escaped += 1
            return
        encoder = self._renderer.encoder
        if is_rendered:
            ids = list(encoder.tokenizer(content, add_special_tokens=False)["input_ids"])
        else:
            ids = encode.encode_prompt(encoder, content, tools)
        if ids:
            self.prompts.append(ProofPrompt(kind, content, tools, ids, is_rendered))

    def _count(self, kind: str) -> int:
        """Return how many prompts of a kind there are."""
        return sum(prompt.kind == kind for prompt in self.prompts)


def _count_bytes(run: Run) -> int:
    """Return the size of the local data files of a recipe."""
    return sum(path.stat().st_size for path in resolved.list_files(run))
