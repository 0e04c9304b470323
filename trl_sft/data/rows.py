"""Loads the sources of a run, formats their rows, holds some out and mixes the rest with the run's seed.

In: a `Run` and what its tokenizer renders. Out: `RunRows`, formatted rows with the order in which they are
trained. Every fault names file and row. Deliberately absent: tokens (`tokens`, `prepared`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from trl_sft.console import format_rows
from trl_sft.data import mix, text_files
from trl_sft.data.formats import TokenizerFeatures
from trl_sft.data.pipeline import formatted, seed
from trl_sft.data.split import FormattedSource, Split, join_splits
from trl_sft.errors import DataError, Fault, RecipeError, UserError, first_line
from trl_sft.recipe.checked import Run, Source

CHAT, PAIRS, TEXT = "a chat", "prompts with completions", "plain text"  # the form of all rows of a run
STREAM_HEAD = 200  # rows of a stream that are read, formatted and checked before training
LEAKED = "stands in the held-out rows"
UNTRAINED = "no trained token"
MAX_UNTRAINED = 0.05  # of the rows, unless data.max_untrained says otherwise


class RunRows(NamedTuple):
    """The rows of a run."""

    train: Split
    eval: dict[str, Split]  # by the name under which each is evaluated; `eval` where there is one
    row_type: str  # CHAT, PAIRS or TEXT
    loss_on: str  # as `data.loss_on` says it
    notes: tuple[str, ...] = ()  # a line a source: rows, layout, wording
    streaming: bool = False  # the rows to train are read while training goes on; `train` holds the first of them

    @property
    def eval_rows(self) -> Dataset | None:
        """All held-out rows, formatted."""
        splits = [split.rows.select(split.order) for split in self.eval.values()]
        return concatenate_datasets(splits) if splits else None

    @property
    def has_escaped_tokens(self) -> bool:
        """Whether some row holds special strings that are plain text."""
        return any(part.has_escaped_tokens for split in (self.train, *self.eval.values()) for part in split.sources)


def load(run: Run, target: TokenizerFeatures, head: int | None = None) -> RunRows:
    """Load, format, split and mix the rows of a run. Raises DataError, RecipeError.

    `head`: only so many rows of each source to train, from its beginning, and none held out; None = all.
    """
    said: list[str] = []
    parts: dict[str, list[Split]] = {"train": [], "eval": []}
    streamed = any(source.load_kwargs.get("streaming") for source in run.sources["train"])
    refused: list[UserError] = []
    for part, source in ((part, source) for part, those in run.sources.items() for source in those):
        if head is not None and part == "eval":
            continue
        beginning = STREAM_HEAD if streamed and part == "train" else head
        try:
            parts[part].append(formatted(run, source, target._replace(task=source.task), said, (part, beginning)))
        except UnicodeDecodeError as error:  # datasets' JSON builder lets such bytes through
            bad = [fault for file in source.location.files for fault in text_files.faults(file)]
            fault = Fault(source.name, f"not UTF-8: {first_line(error)}", "the file saved as UTF-8, or `encoding:`")
            refused.append(DataError(bad or fault))
        except UserError as error:
            refused.append(error)
    if refused:  # every source is looked at
        raise type(refused[0])([fault for error in refused for fault in error.faults])
    form = _one_form(run, parts["train"] + parts["eval"])
    train = join_splits(parts["train"])
    loss_on = _loss_on(run, form, train.sources, streamed)
    if head is not None:
        return RunRows(train, {}, form, loss_on, tuple(said))
    held = dict(zip(_names(run.sources["eval"]), parts["eval"], strict=True))
    if streamed:
        return RunRows(train, held, form, loss_on, tuple(said), streaming=True)
    stay = train.order
    if fraction := run.data.get("eval_fraction"):
        number = round(len(stay) * fraction)
        if number in (0, len(stay)):
            found = f"{fraction} of {len(stay)} rows leaves one split empty"
            where = run.recipe.where(("data", "eval_fraction"))
            raise RecipeError(Fault(where, found, "a fraction that gives both rows"))
        drawn = mix.sampled(len(stay), number, seed(run))
        stay = np.setdiff1d(stay, drawn, assume_unique=True)
        held = {"eval": train._replace(order=drawn, removed_rows={})}
        said.append(f"{number:,} of them held out (eval_fraction {fraction}), {len(stay):,} left to train")
    leaked = _leaked(run, train.rows, held, stay)
    if len(leaked):
        train.removed_rows[LEAKED] = leaked
        stay = np.setdiff1d(stay, leaked, assume_unique=True)
        first = train.row_name(int(leaked[0]))
        stands = "stands" if len(leaked) == 1 else "stand"
        said.append(f"{format_rows(len(leaked))} to train {stands} in the held-out rows too: dropped; first {first}")
    return RunRows(_mixed(run, train, stay), held, form, loss_on, tuple(said))


def _names(held: Sequence[Source]) -> list[str]:
    """Return the names under which sources are evaluated: their tasks or files; `eval` where there is one alone."""
    if len(held) == 1:
        return ["eval"]
    bare = [re.sub(r"\W+", "_", source.task or Path(source.name).name.partition(".")[0]).strip("_") for source in held]
    return [name if bare.count(name) == 1 else f"{name}_{n}" for n, name in enumerate(bare, 1)]


def _leaked(run: Run, train: Dataset, held: dict[str, Split], stay: np.ndarray) -> np.ndarray:
    """Return the rows to train that are held out too, but for case, spacing and punctuation."""
    if not held or run.data.get("drop_leaked") is False:
        return np.zeros(0, dtype=np.int64)
    known = np.concatenate([mix.keys(split.rows)[split.order] for split in held.values()])
    return stay[np.isin(mix.keys(train)[stay], known)]


def _mixed(run: Run, train: Split, stay: np.ndarray) -> Split:
    """Return the rows in the order of an epoch. Raises DataError where a source has none left."""
    of = train.source_indices[stay]
    pools = [stay[of == number] for number in range(len(train.sources))]
    weights = [part.weight for part in train.sources if part.weight is not None]
    for part, pool, source in zip(train.sources, pools, run.sources["train"], strict=True):
        if not len(pool):
            told = (
                f"{part.name} has no row left to train: all stand in the held-out rows (duplicates, or one file twice)"
            )
            raise DataError(Fault(run.recipe.where(source.key), told, "other rows, or data.drop_leaked: false"))
    if weights and 0 in (given := mix.shares([len(pool) for pool in pools], weights)):
        part, source = list(zip(train.sources, run.sources["train"], strict=True))[given.index(0)]
        told = f"weight {part.weight:g} gives {part.name} no row of an epoch of {len(stay):,}"
        raise RecipeError(Fault(run.recipe.where((*source.key, "weight")), told, "a larger weight, or without it"))
    return train._replace(order=mix.order(pools, weights or None, seed(run)))


def _one_form(run: Run, parts: list[Split]) -> str:
    """Return the form of all sources; refuse different ones: they are not trained by one rule."""
    forms = {_form(part.rows) for part in parts}
    if len(forms) > 1:
        found = "; ".join(f"{part.sources[0].name} is {_form(part.rows)}" for part in parts)
        write = "one kind for all: chats (wording: chat), prompts with completions (any other wording), or text"
        raise DataError(Fault(run.recipe.where(("data",)), found, write))
    return forms.pop()


def _form(rows: Dataset) -> str:
    if "text" in rows.column_names:
        return TEXT
    return CHAT if isinstance(rows[0]["completion"], list) else PAIRS


def _loss_on(run: Run, form: str, parts: Sequence[FormattedSource], streamed: bool) -> str:
    """Return where the loss falls: as the recipe says, else on the response.

    Rows that say themselves what the completion is make earlier answers part of the prompt; in a chat of
    several turns every answer is a response; so it is in a stream, whose later rows may have several turns.
    Raises RecipeError.
    """
    asked = run.data.get("loss_on")
    where = run.recipe.where(("data", "loss_on"))
    if form == TEXT:
        if asked not in (None, "all"):
            raise RecipeError(Fault(where, f"loss_on: {asked}, but rows of text have no response", "loss_on: all"))
        return "all"
    if form == PAIRS and asked in ("assistant", "last_turn"):
        write = "completion or all; or wording: chat, with tokenizer.chat_template where the model has none"
        raise RecipeError(Fault(where, f"loss_on: {asked}, but the rows become plain text", write))
    several = streamed or any(part.multi_turn for part in parts)
    if form == PAIRS or not several or asked == "all":
        return str(asked or "completion")
    given = {part.format == "prompt_completion" for part in parts}
    if asked is None and len(given) > 1:
        found = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(Fault(where, found, "loss_on: assistant, last_turn or all"))
    if asked == "completion":
        return "completion" if given == {True} else "last_turn"
    return str(asked or ("completion" if given == {True} else "assistant"))
