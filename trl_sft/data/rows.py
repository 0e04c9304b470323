"""The rows of a run: its sources formatted, split into training and evaluation sets, and mixed with the run's seed.

Inputs: a `Run` and what its tokenizer can do. Outputs: `RunRows`, formatted rows with the order in which they are
trained; every fault names file and row. Deliberately not here: tokens (`trl_sft.tokenization`).
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from datasets import Dataset, concatenate_datasets

from trl_sft.console import format_names, format_rows
from trl_sft.data import bad_rows, mix, rendered_text
from trl_sft.data.file_diagnosis import diagnose
from trl_sft.data.formats import CHAT, PAIRS, TEXT, TokenizerFeatures
from trl_sft.data.pipeline import FormattedSource, Split, format_source, join_splits
from trl_sft.errors import DataError, Fault, RecipeError, UserError
from trl_sft.recipe import rules
from trl_sft.recipe.checked import Run
from trl_sft.row_progress import RowProgress

STREAM_HEAD = 200  # rows of each stream that are read, formatted and checked before training
_MANY_SOURCES = 20  # sources for which a terminal shows how many are read; each shows its own rows too
LEAKED = "also in the evaluation set"  # why a training row is removed


class RunRows(NamedTuple):
    """The rows of a run."""

    train: Split
    eval: dict[str, Split]  # by the name under which each is evaluated; `eval` where there is one
    row_type: str  # TRL's dataset type of all rows: CHAT, PAIRS or TEXT
    loss_on: str  # which part carries loss: completion, assistant, last_turn or all
    skips_empty_thoughts: bool  # whether an empty thought at the beginning of an answer carries no loss
    notes: tuple[str, ...] = ()  # lines for the screen: rows, format and wording of each source
    streaming: bool = False  # the rows to train are read while training goes on; `train` holds the first of them

    @property
    def sources(self) -> list[FormattedSource]:
        """All sources, each once, also where rows to train and to evaluate come from one source."""
        sources = [source for split in (self.train, *self.eval.values()) for source in split.sources]
        return list({source.source.key: source for source in sources}.values())

    @property
    def eval_rows(self) -> Dataset | None:
        """All rows of the evaluation sets, formatted; None = there are none."""
        splits = [split.rows.select(split.order) for split in self.eval.values()]
        return concatenate_datasets(splits) if splits else None


def load(run: Run, features: TokenizerFeatures, head: int | None = None) -> RunRows:
    """Load, format, split and mix the rows of a run.

    Args:
        run: the checked recipe.
        features: what the tokenizer can do.
        head: the number of rows of each training source to read, from its beginning, without an evaluation set;
            None = all rows.

    Returns:
        The rows. Those that cannot be formatted are in `bad_rows` of their split, and `tokenize` refuses them together
        with those that the chat template does not take.

    Raises:
        DataError: sources cannot be read, or too few rows are left; of all sources at once.
        RecipeError: keys of the recipe contradict each other or the rows.

    """
    streaming = any(source.load_kwargs.get("streaming") for source in run.sources["train"])
    train_splits, eval_splits = _format_sources(
        run, features, train_head=STREAM_HEAD if streaming else head, with_evaluation=head is None
    )
    _check_rows_left(run, train_splits, eval_splits)
    try:
        return _arrange(run, train_splits, eval_splits, streaming=streaming, head=head)
    except UserError as error:  # the faults of rows are shown with it
        raise type(error)([*error.faults, *_list_bad_rows(run, train_splits, eval_splits)]) from None


def _arrange(
    run: Run, train_splits: list[Split], eval_splits: list[Split], *, streaming: bool, head: int | None
) -> RunRows:
    """Return the rows of a run from the rows of its sources. The arguments are those of `load`. Raises UserError."""
    sources = [source for split in (*train_splits, *eval_splits) for source in split.sources]
    row_type = _common_row_type(run, sources)
    notes = [note for source in sources for note in source.notes]
    train = join_splits(train_splits)
    if row_type == TEXT and run.data.get("loss_on") not in (None, "all"):
        raise RecipeError(_explain_text(run, train))
    loss_on = _choose_loss_on(run, row_type, train.sources, streaming=streaming)
    skips_empty_thoughts = _skips_empty_thoughts(run, row_type)
    names = _evaluation_names([split.sources[0] for split in eval_splits])
    evaluation = dict(zip(names, eval_splits, strict=True))
    if head is None and not streaming:
        if fraction := run.data.get("eval_fraction"):
            train, evaluation["eval"] = _hold_out(run, train, fraction)
            held_out, remaining = len(evaluation["eval"].order), len(train.order)
            share = f"eval_fraction {fraction}"
            note = f"{format_rows(held_out)} held out for evaluation ({share}), {remaining:,} left to train"
            notes.append(note)
        if run.data.get("drop_leaked") is not False:
            train = _remove_leaked(train, evaluation)
            notes += _note_leaked(train)
        train = _mix(run, train)
    return RunRows(train, evaluation, row_type, loss_on, skips_empty_thoughts, tuple(notes), streaming and head is None)


def _format_sources(
    run: Run, features: TokenizerFeatures, *, train_head: int | None, with_evaluation: bool
) -> tuple[list[Split], list[Split]]:
    """Return the rows of each source, to train and to evaluate. Raises UserError with the faults of all sources."""
    train: list[Split] = []
    evaluation: list[Split] = []
    errors: list[UserError] = []
    sources = [(source, train_head, train) for source in run.sources["train"]]
    if with_evaluation:
        sources += [(source, None, evaluation) for source in run.sources["eval"]]
    with RowProgress(
        "Reading sources", len(sources), shows_bar=len(sources) > _MANY_SOURCES, unit="sources"
    ) as progress:
        for source, head, splits in sources:
            try:
                splits.append(format_source(run, source, features, max_rows=head))
            except UserError as error:
                errors.append(error)
            progress.update(1)
    if errors:
        faults = [fault for error in errors for fault in error.faults]
        raise type(errors[0])([*faults, *_list_bad_rows(run, train, evaluation)])
    return train, evaluation


def _list_bad_rows(run: Run, train_splits: Sequence[Split], eval_splits: Sequence[Split]) -> list[Fault]:
    """Return the faults of rows that cannot be formatted, of all sources; [] = the run goes on without them."""
    names = _evaluation_names([split.sources[0] for split in eval_splits])
    parts = [("train", list(train_splits)), *((name, [split]) for name, split in zip(names, eval_splits, strict=True))]
    faults = [fault for split in (*train_splits, *eval_splits) for fault in split.sources[0].faults]
    for part, splits in parts:
        kinds = bad_rows.join(split.bad_rows for split in splits)
        faults += bad_rows.list_faults(run, kinds, part=part, total=sum(len(split.rows) for split in splits))
    return faults


def check_bad_rows(run: Run, rows: RunRows) -> None:
    """Refuse rows that cannot be formatted, where no tokenizer shows which of them cannot be rendered.

    Raises:
        DataError: one fault for each kind of problem.

    """
    faults = [fault for source in rows.sources for fault in source.faults]
    for part, split in {"train": rows.train, **rows.eval}.items():
        total = len(np.unique(split.order)) + bad_rows.count(split.bad_rows)
        faults += bad_rows.list_faults(run, split.bad_rows, part=part, total=total)
    if faults:
        raise DataError(faults)


def _check_rows_left(run: Run, train_splits: Sequence[Split], eval_splits: Sequence[Split]) -> None:
    """Refuse sources of which no row can be trained or evaluated. Raises DataError."""
    empty = [split for split in (*train_splits, *eval_splits) if not len(split.order)]
    if not empty:
        return
    faults = _list_bad_rows(run, train_splits, eval_splits)
    for split in empty:
        if faults and split.bad_rows:
            continue
        reasons = format_names([f"{len(numbers):,} {reason}" for reason, numbers in split.removed_rows.items()])
        source = split.sources[0]
        problem = f"{source.name} has no row left: {reasons}"
        where = run.recipe.where(source.source.key)
        faults.append(Fault(where, problem, "Correct its rows, or remove the source.", code="data.no_rows_left"))
    raise DataError(faults)


def _common_row_type(run: Run, sources: Sequence[FormattedSource]) -> str:
    """Return the dataset type of all sources. Raises DataError if they differ: one loss cannot train both."""
    row_types = {source.row_type for source in sources}
    if len(row_types) > 1:
        raise DataError(_explain_row_types(run, sources))
    return row_types.pop()


def _explain_row_types(run: Run, sources: Sequence[FormattedSource]) -> Fault:
    """Return the fault of sources of different dataset types."""
    problem = format_names([f"{source.name} is {source.row_type}" for source in sources])
    fix = (
        "Give all sources one type: chats (`wording: chat`), prompts with completions (any other wording), "
        "or plain text."
    )
    return Fault(run.recipe.where(("data",)), problem, fix, code="data.mixed_row_types")


def _choose_loss_on(run: Run, row_type: str, sources: Sequence[FormattedSource], *, streaming: bool) -> str:
    """Return which tokens carry loss: as the recipe says, else the response.

    Rows of format prompt_completion say themselves what the completion is, so earlier answers are part of the
    prompt. In a chat of several turns every answer is a response; so it is in a stream, whose later rows may have
    several turns.

    Args:
        run: the checked recipe.
        row_type: CHAT, PAIRS or TEXT.
        sources: the sources to train.
        streaming: whether they are read while training goes on.

    Returns:
        completion, assistant, last_turn or all.

    Raises:
        RecipeError: `data.loss_on` does not fit the rows, or the rows leave it open.

    """
    choice = rules.split_loss_on(run.data.get("loss_on"))[0] or None
    where = run.recipe.where(("data", "loss_on"))
    if row_type == TEXT:
        return "all"
    if row_type == PAIRS and choice in ("assistant", "last_turn"):
        fix = (
            "Set `loss_on` to completion or all. Or set `wording: chat`, with `tokenizer.chat_template` where the "
            "model has none."
        )
        raise RecipeError(
            Fault(where, f"loss_on: {choice}, but the rows become plain text", fix, code="data.loss_on_mismatch")
        )
    multi_turn = streaming or any(source.multi_turn for source in sources)
    if row_type == PAIRS or not multi_turn or choice == "all":
        return str(choice or "completion")
    has_completion = {source.source_format.format == "prompt_completion" for source in sources}
    if choice is None and len(has_completion) > 1:
        problem = "some sources say what their completion is, others are chats of several turns"
        raise RecipeError(
            Fault(where, problem, "Set `loss_on` to assistant, last_turn or all.", code="data.loss_on_unclear")
        )
    if choice == "completion":
        return "completion" if has_completion == {True} else "last_turn"
    return str(choice or ("completion" if has_completion == {True} else "assistant"))


def _skips_empty_thoughts(run: Run, row_type: str) -> bool:
    """Tell whether empty thoughts carry no loss. Raises RecipeError where rows are no chats, which alone have any."""
    skips = rules.split_loss_on(run.data.get("loss_on"))[1]
    if skips and row_type != CHAT:
        problem = (
            f"loss_on: {rules.WITHOUT_EMPTY_THOUGHTS}, but the rows are {row_type}: a chat template writes thoughts"
        )
        fix = f"Remove {rules.WITHOUT_EMPTY_THOUGHTS}, or set `wording: chat`."
        raise RecipeError(Fault(run.recipe.where(("data", "loss_on")), problem, fix, code="data.loss_on_mismatch"))
    return skips


def _explain_text(run: Run, train: Split) -> Fault:
    """Return the fault of a `loss_on` that names the answer, where rows are texts: how to split them."""
    source = train.sources[0].source
    entry = diagnose.read_entry(run.recipe, source)
    advice, new_entry = rendered_text.advise_split(train.rows["text"][: rendered_text.SAMPLE], entry)
    problem = f"loss_on: {run.data['loss_on']}, but {source.name} has rows of text, which do not say what the answer is"
    fix = f"{advice}. Set the source to `{diagnose.write_value(new_entry)}`. Or set `loss_on: all` to train all tokens."
    return Fault(run.recipe.where(("data", "loss_on")), problem, fix, code="data.loss_on_mismatch")


def _evaluation_names(sources: Sequence[FormattedSource]) -> list[str]:
    """Return the names under which sources are evaluated: their tasks or files; `eval` for a single source."""
    if len(sources) == 1:
        return ["eval"]
    return make_unique_names([source.source.task or source.short_name for source in sources])


def make_unique_names(titles: Sequence[str]) -> list[str]:
    """Return titles as names for keys of the log: words joined by `_`; of equal ones each has its number."""
    names = [re.sub(r"\W+", "_", title).strip("_") or "unnamed" for title in titles]
    counts = Counter(names)
    return [name if counts[name] == 1 else f"{name}_{number}" for number, name in enumerate(names, 1)]


def _hold_out(run: Run, train: Split, fraction: float) -> tuple[Split, Split]:
    """Return the rows that are left to train, and a random sample to evaluate. Raises RecipeError."""
    total = len(train.order)
    number = round(total * fraction)
    if number in (0, total):
        raise RecipeError(_explain_empty_part(run, total, fraction))
    held_out = train.order[mix.sample_numbers(total, number, mix.run_seed(run))]
    remaining = np.setdiff1d(train.order, held_out, assume_unique=True)
    return train._replace(order=remaining), train._replace(order=held_out, removed_rows={}, bad_rows={})


def _explain_empty_part(run: Run, total: int, fraction: float) -> Fault:
    """Return the fault of a fraction that leaves one of the two parts without a row."""
    problem = f"{fraction} of {format_rows(total)} leaves no row to train or none to evaluate"
    fix = "Choose a fraction that leaves rows to train and to evaluate."
    if total > 1:
        fix = f"Set `data.eval_fraction: {math.ceil(100 / total) / 100}` or more, below 1, or add rows."
    return Fault(run.recipe.where(("data", "eval_fraction")), problem, fix, code="data.empty_split")


def _remove_leaked(train: Split, evaluation: dict[str, Split]) -> Split:
    """Remove the training rows that also occur in the evaluation set, ignoring case, spacing and punctuation."""
    if not evaluation:
        return train
    evaluation_keys = np.concatenate([mix.dataset_keys(split.rows)[split.order] for split in evaluation.values()])
    train_keys = mix.dataset_keys(train.rows)[train.order]
    leaked = train.order[np.isin(train_keys, evaluation_keys)]
    remaining = np.setdiff1d(train.order, leaked, assume_unique=True)
    if not len(leaked):
        return train
    return train._replace(order=remaining, removed_rows={**train.removed_rows, LEAKED: leaked})


def _note_leaked(train: Split) -> Iterator[str]:
    """Yield a note on the rows that were removed from training because they are in the evaluation set."""
    numbers = train.removed_rows.get(LEAKED)
    if numbers is not None:
        verb = "is" if len(numbers) == 1 else "are"
        first = train.row_name(int(numbers[0]))
        yield f"{format_rows(len(numbers))} to train {verb} {LEAKED} and {verb} removed; the first is {first}"


def _mix(run: Run, train: Split) -> Split:
    """Return the rows in the order of an epoch. Raises DataError, RecipeError if a source contributes no row."""
    indices = train.source_indices[train.order]
    pools = [train.order[indices == index] for index in range(len(train.sources))]
    sizes = [len(pool) for pool in pools]
    if 0 in sizes:
        raise DataError(_explain_removed_source(run, train, sizes.index(0)))
    weights = [source.weight for source in train.sources if source.weight is not None]
    if weights and 0 in (shares := mix.share_epoch(sizes, weights)):
        raise RecipeError(_explain_small_weight(run, train.sources[shares.index(0)], total=sum(sizes)))
    return train._replace(order=mix.order_epoch(pools, weights or None, mix.run_seed(run)))


def _explain_removed_source(run: Run, train: Split, index: int) -> Fault:
    """Return the fault of the source with this index, whose rows are all removed from training or held out."""
    source = train.sources[index]
    where = run.recipe.where(source.source.key)
    leaked = train.removed_rows.get(LEAKED, np.arange(0))
    if (train.source_indices[leaked] == index).any():
        problem = f"{source.name} has no row left to train: all are {LEAKED} (duplicates, or the same file twice)"
        fix = "Choose other rows, or set `data.drop_leaked: false`."
        return Fault(where, problem, fix, code="data.all_rows_leaked")
    problem = (
        f"{source.name} has no row left to train: eval_fraction {run.data.get('eval_fraction')} holds out all of them"
    )
    fix = "Write more rows into it, or name an evaluation set with `data.eval` and remove `data.eval_fraction`."
    return Fault(where, problem, fix, code="data.all_rows_held_out")


def _explain_small_weight(run: Run, source: FormattedSource, *, total: int) -> Fault:
    """Return the fault of a source whose weight gives it no row of an epoch of `total` rows."""
    where = run.recipe.where((*source.source.key, "weight"))
    problem = f"weight {source.weight:g} gives {source.name} no row of an epoch of {total:,}"
    return Fault(where, problem, "Set a larger weight, or remove the source.", code="data.weight_too_small")
