"""A finished run, prepared again so that short reruns of it can be trained: its recipe, its rows, its base model.

Inputs: the recipe of the run as it ran, and its run.json. Outputs: a `ShortRun`, or a fault that names what cannot be
rerun. What a rerun has no use for is left out: evaluation, checkpoints, reports, the hub. Not here: the reruns
(`reruns`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from datasets import Dataset

from trl_sft.data.formats import TASK
from trl_sft.data.pipeline import Split
from trl_sft.errors import DataError, Fault, RecipeError
from trl_sft.recipe import data_files
from trl_sft.recipe.checked import Run
from trl_sft.suspects import token_rows
from trl_sft.suspects.token_rows import TokenRow
from trl_sft.tokenization import token_digest
from trl_sft.tokenization.encode import IGNORED, EncodedRows
from trl_sft.training import stages
from trl_sft.training.stages import TrainingInputs

_TRAIN = "train"
_PREFIXES = ("eval_", "save_", "logging_", "hub_", "push_to_hub", "trackio_")
_LEFT_OUT = (
    *("load_best_model_at_end", "metric_for_best_model", "greater_is_better", "resume_from_checkpoint", "report_to"),
    *("run_name", "output_dir", "data_seed", "max_steps", "num_train_epochs", "disable_tqdm"),
)
_RESTS = ("eval_packing",)  # it decides what the tokens of held-out rows are
_QUIET = {"save_strategy": "no", "eval_strategy": "no", "logging_strategy": "no", "report_to": "none"}
_OPTIONS_LEFT_OUT = ("early_stopping", "mirror", "max_hours", "resume", "overwrite")
_SEVERAL_PROCESSES = ("deepspeed", "fsdp", "fsdp_config", "parallelism_config")
_MOST_HELD_OUT = 1000  # rows: 500 choose suspects, 500 judge


@dataclass(frozen=True)
class KindedRows:
    """Rows as tokens, each with its kind."""

    rows: list[TokenRow]
    kinds: list[str]  # task, or else source


@dataclass(frozen=True)
class ShortRun:
    """What every rerun shares.

    Attributes:
        run: the recipe without what a rerun has no use for.
        inputs: model, tokenizer and rows.
        temporary: the output folder of the trainers; nothing in it stays.
        steps: of the whole run.
        train: the training rows, each once.
        choosing: held-out rows whose gradient and losses choose suspects.
        judging: the other held-out rows, which judge.
        prompts: of the judging rows, as digests.
        tokens: digests of all rows.

    """

    run: Run
    inputs: TrainingInputs
    temporary: Path
    steps: int
    train: KindedRows
    choosing: KindedRows
    judging: KindedRows
    prompts: list[int]
    tokens: Mapping[str, Any]

    @property
    def train_split(self) -> Split:
        """The formatted training rows."""
        return self.inputs.datasets.encoded[_TRAIN][0]


def prepare(run: Run, record: Mapping[str, Any], *, folder: Path, temporary: Path) -> ShortRun:
    """Prepare a finished run again.

    Args:
        run: its recipe as it ran (`resolved.yaml`).
        record: its run.json.
        folder: its run folder, for messages.
        temporary: an empty folder.

    Raises:
        UserError: the run cannot be rerun here, or its rows are not those of the run any more.

    """
    _refuse_kinds(run, record, folder)
    short = _leave_out(run, temporary)
    files = data_files.read(short)
    settings, model, chat, rows = stages.read_rows(short)
    datasets = stages.tokenize(short, chat, rows, settings=settings)
    if not isinstance(datasets.train, Dataset):
        raise _explain(folder, "its rows were streamed", "Leave out `streaming`, train, and name that run.")
    tokens = token_digest.compute(datasets, files.digests)
    before = record.get("tokens", {}) | {"files": record.get("data", {})}
    difference = token_digest.describe_difference(before, tokens)
    if difference:
        problem = f"its rows are not those of the run any more: {difference}"
        fix = "Restore what changed, or run the recipe again."
        raise DataError(Fault(str(folder), problem, fix, code="evaluation.changed_rows"))
    held_out: list[tuple[TokenRow, str]] = []
    for name, part in datasets.encoded.items():
        if name != _TRAIN:
            own = _read_part(*part)
            held_out += zip(own.rows, own.kinds, strict=True)
    choosing, judging, prompts = split_held_out(held_out)
    return ShortRun(
        short,
        TrainingInputs(settings, model, chat, rows, datasets),
        temporary,
        steps=int(record["steps"]),
        train=_read_part(*datasets.encoded[_TRAIN]),
        choosing=choosing,
        judging=judging,
        prompts=prompts,
        tokens=tokens,
    )


def split_held_out(rows: Sequence[tuple[TokenRow, str]]) -> tuple[KindedRows, KindedRows, list[int]]:
    """Divide held-out rows into those that choose and those that judge; rows of one prompt stay together.

    The division follows from the digests of the prompts, so it is the same in every call and for every order of rows.

    Args:
        rows: each with its kind.

    Returns:
        The two halves, and the prompts of the second as digests.

    """
    by_prompt: dict[int, list[tuple[TokenRow, str]]] = {}
    for entry in rows:
        by_prompt.setdefault(_digest_prompt(entry[0]), []).append(entry)
    halves: tuple[list[tuple[TokenRow, str]], ...] = ([], [])
    prompts: list[int] = []
    for number, prompt in enumerate(sorted(by_prompt)):
        half = halves[number % 2]
        if len(half) < _MOST_HELD_OUT // 2:
            half += by_prompt[prompt]
            prompts += [prompt] * len(by_prompt[prompt]) if number % 2 else []
    choosing, judging = (KindedRows([row for row, _ in half], [kind for _, kind in half]) for half in halves)
    return choosing, judging, prompts


def _digest_prompt(row: TokenRow) -> int:
    """Return a digest of the tokens without loss; of all tokens where each has one."""
    prompt = row.input_ids[row.labels == IGNORED]
    ids = prompt if len(prompt) else row.input_ids
    return xxhash.xxh3_64_intdigest(np.ascontiguousarray(ids, dtype=np.int64).tobytes())


def _read_part(split: Split, encoded: EncodedRows) -> KindedRows:
    """Return the rows of a split with their kinds."""
    rows = token_rows.read_rows(encoded)
    tasks = split.rows.with_format(None)[TASK][:] if TASK in split.rows.column_names else [None] * len(split.rows)
    kinds = [tasks[row.number] or split.sources[int(split.source_indices[row.number])].name for row in rows]
    return KindedRows(rows, kinds)


def _refuse_kinds(run: Run, record: Mapping[str, Any], folder: Path) -> None:
    """Refuse runs that one process cannot repeat in short. Raises RecipeError."""
    processes = record.get("measured", {}).get("before_training", {}).get("processes", 1)
    keys = [f"train.{name}" for name in _SEVERAL_PROCESSES if run.train.get(name)]
    keys += ["model.distributed_config"] if "distributed_config" in run.model else []
    if processes > 1 or keys:
        problem = f"it was trained by {processes} processes" if processes > 1 else f"it sets `{keys[0]}`"
        fix = "Train the recipe in one process, on a part of the rows where that takes too long, and name that run."
        raise _explain(folder, f"{problem}, and reruns are trained by one", fix)
    if any(source.load_kwargs.get("streaming") for source in run.sources[_TRAIN]):
        raise _explain(folder, "its rows were streamed", "Leave out `streaming`, train, and name that run.")
    if not run.sources.get("eval") and not run.data.get("eval_fraction"):
        fix = "Hold out rows with `data.eval_fraction`, train, and name that run."
        raise _explain(folder, "it has no held-out rows, and only they show which rows hurt", fix)


def _explain(folder: Path, problem: str, fix: str) -> RecipeError:
    """Return the error of a run that cannot be rerun."""
    return RecipeError(Fault(str(folder), f"the run cannot be rerun: {problem}", fix, code="evaluation.not_rerun"))


def _leave_out(run: Run, temporary: Path) -> Run:
    """Return the recipe without what a rerun has no use for. Its seed stays: held-out rows are drawn with it."""
    train = {
        name: value
        for name, value in run.train.items()
        if name in _RESTS or (name not in _LEFT_OUT and not name.startswith(_PREFIXES))
    }
    options = {name: value for name, value in run.options.items() if name not in _OPTIONS_LEFT_OUT}
    return dataclasses.replace(
        run,
        train=train | _QUIET | {"disable_tqdm": True},
        options=options,
        evaluate=None,
        output_dir=temporary,
        implied={},
        launch={},
    )
