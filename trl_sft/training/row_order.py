"""Which rows a finished run trained between two of its steps, in the order of training.

In: the run folder with its checkpoints, the recipe with its rows. Out: the rows with their steps; or a fault that says
why they cannot be named. Nothing is trained: the Trainer's own sampler is asked again with the settings and the
seed of the run, and the rows and tokens that it yields are compared with those that the checkpoints have counted. Not
here: which two steps (`cli.evaluate.bisection`).

The Trainer chooses rows as transformers 5.17 to 5.23 do: `Trainer.get_train_dataloader`, accelerate's seedable sampler
by epoch, and in each epoch as many batches a step as `gradient_accumulation_steps` says.
"""

from __future__ import annotations

import base64
import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, List, Value
from transformers import Trainer, TrainingArguments
from trl import SFTConfig, pack_dataset

from trl_sft import checkpoints, run_folder
from trl_sft.data import formatted_columns
from trl_sft.data.messages import unescape
from trl_sft.data.pipeline import Split
from trl_sft.errors import DataError, Fault
from trl_sft.recipe import data_files
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import token_digest
from trl_sft.tokenization.build import TokenizedRows
from trl_sft.training import manifest, stages

_CONSUMED, _PROGRESS, _RANDOM_STATE = "consumed", "progress", "random_state_of_epoch"  # in the record of a checkpoint
_TOKENS = "tokens"
_INDEX = "index"
_BATCH_ROWS = 1000
_DRAWING = ("transformers", "accelerate", "torch", "trl", "datasets")  # packages that decide the order of rows
_CONTENT = ("prompt", "completion", "text", "tools", "task")  # columns of a formatted row
# settings of the Trainer that decide which rows a step has
_ORDER_KEYS = (
    *("seed", "data_seed", "per_device_train_batch_size", "gradient_accumulation_steps", "train_sampling_strategy"),
    *("group_by_length", "length_column_name", "dataloader_drop_last"),
)


class TrainedRow(NamedTuple):
    """A row of one optimizer step."""

    step: int
    place: str  # in messages: its file, its number there and its line
    file: str  # its name; "" = the rows stand in no file with lines
    line: int | None
    source: str
    content: Mapping[str, Any]  # as the format made it: messages, prompt and completion, or text


class TrainedRows(NamedTuple):
    """The rows of some steps."""

    rows: list[TrainedRow]
    note: str  # what makes the order less sure; "" = nothing


def list_rows(run: Run, folder: Path, *, after: int, last: int) -> TrainedRows:
    """Return the rows that were trained after step `after`, up to and with step `last`.

    Args:
        run: the recipe as it ran (`resolved.yaml`).
        folder: the run folder, with the checkpoints of both steps.
        after: the step of a checkpoint; 0 = before training.
        last: the step of a later checkpoint.

    Raises:
        UserError: the rows cannot be read, are not those of the run any more, or their order is not known.

    """
    records = {
        step: checkpoints.read_record(folder / f"{run_folder.CHECKPOINT}{step}") for step in (after, last) if step
    }
    files = data_files.read(run)
    settings, _, chat, rows = stages.read_rows(run, any_machine=True)
    datasets = stages.tokenize(run, chat, rows, settings=settings)
    if not isinstance(datasets.train, Dataset):
        problem = "the rows were streamed, and a stream has no order that can be read again"
        raise _explain(folder, problem, "Look at the steps in log.jsonl, or train without `streaming`.")
    _check_tokens(folder, records, token_digest.compute(datasets, files.digests))
    order = _draw_order(settings.args, datasets, records, after=after, last=last, folder=folder)
    _check_counts(folder, records, datasets, order=order, after=after, last=last)
    split, numbers = datasets.encoded["train"][0], _number_rows(datasets, settings.args)
    trained = [
        _describe_row(split, number, step=step)
        for step, indices in order
        for index in indices
        for number in numbers[index]
    ]
    return TrainedRows(trained, _compare_versions(records[last], manifest.describe_environment(run)))


def _compare_versions(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return a note on packages that draw rows and are of another version than in the run; "" = none."""
    versions = [section.get("versions", {}) for section in (before, now)]
    changes = [
        f"{name} {versions[0][name]} -> {versions[1][name]}"
        for name in _DRAWING
        if None not in (versions[0].get(name), versions[1].get(name)) and versions[0][name] != versions[1][name]
    ]
    return f"{', '.join(changes)} since the run, so the order of the rows may have been another" if changes else ""


def _check_tokens(folder: Path, records: Mapping[int, Mapping[str, Any]], tokens: dict[str, Any]) -> None:
    """Refuse rows that are not those of the run any more. Raises DataError."""
    for record in records.values():
        before = record.get(_TOKENS, {}) | {"files": record.get("data", {})}
        difference = token_digest.describe_difference(before, tokens)
        if "the training rows" in difference:
            problem = f"the rows cannot be named, since they are not those of the run any more: {difference}"
            raise _explain(folder, problem, "Restore what changed, and run the same command again.")


def _draw_order(
    args: SFTConfig,
    datasets: TokenizedRows,
    records: Mapping[int, Mapping[str, Any]],
    *,
    after: int,
    last: int,
    folder: Path,
) -> list[tuple[int, list[int]]]:
    """Return the steps with the numbers of their rows, or packs, in the dataset. Raises DataError."""
    sizes = {record.get(checkpoints.ROWS_PER_STEP) for record in records.values()}
    own = args.per_device_train_batch_size * args.gradient_accumulation_steps
    size = sizes.pop() if len(sizes) == 1 else None
    if not isinstance(size, int) or size % own:
        problem = "the rows cannot be named: the run went on with another batch size than it began with"
        raise _explain(folder, problem, "Look at the steps in log.jsonl.")
    batches_per_step = size // args.per_device_train_batch_size
    lengths = _count_tokens(datasets)
    with tempfile.TemporaryDirectory() as temporary:
        loader = _build_loader(args, lengths, temporary)
        epoch_steps = -(-len(loader) // batches_per_step)
        states = _read_random_states(folder, epoch_steps)
        order: list[tuple[int, list[int]]] = []
        for epoch in range(after // epoch_steps, (last - 1) // epoch_steps + 1):
            if "group_by_length" in _read_strategy(args):
                if epoch not in states:
                    problem = f"the rows cannot be named: no checkpoint has the random state of epoch {epoch + 1}, "
                    problem += "from which `group_by_length` drew their order"
                    raise _explain(
                        folder, problem, "Save a checkpoint in each epoch of the next run (`train.save_steps`)."
                    )
                torch.set_rng_state(states[epoch])
            for number, batch in enumerate(_read_epoch(loader, epoch)):
                step = epoch * epoch_steps + number // batches_per_step + 1
                if after < step <= last:
                    if not order or order[-1][0] != step:
                        order.append((step, []))
                    order[-1][1].extend(batch)
    return order


def _build_loader(args: SFTConfig, lengths: np.ndarray, folder: str) -> Any:
    """Return the Trainer's own loader over the numbers of rows, for one process."""
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    keywords = {name: getattr(args, name) for name in _ORDER_KEYS if name in names}
    config = args.accelerator_config
    keywords["accelerator_config"] = config if isinstance(config, dict) else config.to_dict()
    own = TrainingArguments(output_dir=folder, report_to=[], remove_unused_columns=False, **keywords)
    columns = {_INDEX: list(range(len(lengths)))}
    if "group_by_length" in _read_strategy(args):
        columns[str(args.length_column_name)] = lengths.tolist()
    trainer = Trainer(
        model=torch.nn.Linear(1, 1),
        args=own,
        train_dataset=Dataset.from_dict(columns),
        data_collator=lambda batch: [row[_INDEX] for row in batch],
    )
    return trainer.get_train_dataloader()


def _read_strategy(args: SFTConfig) -> str:
    """Return how rows are sampled; transformers before 5.20 may have `group_by_length` as a key of its own."""
    if getattr(args, "group_by_length", False):
        return "group_by_length"
    strategy = getattr(args, "train_sampling_strategy", "random")
    return str(getattr(strategy, "value", strategy))


def _read_epoch(loader: Any, epoch: int) -> Iterator[list[int]]:
    """Yield the batches of an epoch, as the Trainer begins one."""
    loader.set_epoch(epoch)
    sampler: Any = getattr(getattr(loader, "batch_sampler", None), "batch_sampler", None)
    if hasattr(sampler, "set_epoch"):
        sampler.set_epoch(epoch)
    yield from loader


def _read_random_states(folder: Path, epoch_steps: int) -> dict[int, torch.Tensor]:
    """Return the random state with which each epoch began, as far as checkpoints have it: epoch from 0 -> state."""
    states = {}
    for checkpoint in run_folder.list_checkpoints(folder):
        saved = checkpoints.read_record(checkpoint).get(_PROGRESS, {}).get(_RANDOM_STATE)
        if saved:
            state = torch.frombuffer(bytearray(base64.b64decode(saved)), dtype=torch.uint8)
            states[run_folder.get_step(checkpoint) // epoch_steps] = state
    return states


def _check_counts(
    folder: Path,
    records: Mapping[int, Mapping[str, Any]],
    datasets: TokenizedRows,
    *,
    order: Sequence[tuple[int, list[int]]],
    after: int,
    last: int,
) -> None:
    """Refuse an order whose rows and tokens are not those that the checkpoints have counted. Raises DataError."""
    consumed = {step: record.get(_PROGRESS, {}).get(_CONSUMED, {}) for step, record in records.items()}
    lengths = _count_tokens(datasets)
    indices = [index for _, batch in order for index in batch]
    found = {"rows": len(indices), _TOKENS: int(lengths[indices].sum())}
    counted = {
        name: consumed[last].get(name, 0) - (consumed[after].get(name, 0) if after else 0) for name in ("rows", _TOKENS)
    }
    if found != counted:
        problem = f"the rows cannot be named: the run counted {counted['rows']:,} rows and {counted[_TOKENS]:,} tokens "
        problem += f"in these steps, and its order drawn again has {found['rows']:,} and {found[_TOKENS]:,}"
        fix = "Run the command with the versions of transformers and accelerate that run.json names."
        raise _explain(folder, problem, fix)


def _count_tokens(datasets: TokenizedRows) -> np.ndarray:
    """Return the tokens of each row of the dataset, or pack, in its order: (rows,)."""
    assert isinstance(datasets.train, Dataset)  # a stream is refused before
    batches = datasets.train.with_format("arrow").iter(_BATCH_ROWS)  # shuffled rows do not lie in their order
    return np.concatenate([pc.list_value_length(table["input_ids"]).to_numpy() for table in batches])


def _number_rows(datasets: TokenizedRows, args: SFTConfig) -> list[list[int]]:
    """Return for each row of the dataset, or pack, the numbers of the rows of the split that it holds."""
    encoded = datasets.encoded["train"][1]
    seed = args.seed if args.shuffle_dataset else None
    numbers = encoded.rows.data["row"].to_numpy()
    if not args.packing:
        if seed is not None:
            numbers = np.array(Dataset.from_dict({_INDEX: numbers}).shuffle(seed=seed)[_INDEX])
        return [[int(number)] for number in numbers]
    lengths = pc.list_value_length(encoded.rows.data["input_ids"]).to_numpy()
    offsets = np.cumsum([0, *lengths.tolist()], dtype=np.int32)
    # TRL packs by the lengths alone, so the number of its row stands in the place of each token
    values = pa.array(np.repeat(numbers, lengths).astype(np.int64))
    table = pa.table({"input_ids": pa.ListArray.from_arrays(pa.array(offsets), values)})
    rows = Dataset(table).cast_column("input_ids", List(Value("int64")))
    rows = rows if seed is None else rows.shuffle(seed=seed)
    packs = pack_dataset(rows, args.max_length, args.packing_strategy)
    packs = packs if seed is None else packs.shuffle(seed=seed)
    return [list(dict.fromkeys(pack)) for pack in packs["input_ids"]]


def _describe_row(split: Split, number: int, *, step: int) -> TrainedRow:
    """Return a row of the split with its place."""
    source = split.sources[int(split.source_indices[number])]
    located = source.places.locate_row(int(split.row_numbers[number]))
    row = formatted_columns.read_row(split.rows, number)
    content = {name: unescape(row[name]) for name in _CONTENT if row.get(name)}
    return TrainedRow(
        step, split.row_name(number), str(located.get("file", "")), located.get("line"), source.name, content
    )


def _explain(folder: Path, problem: str, fix: str) -> DataError:
    """Return the error of rows that cannot be named."""
    return DataError(Fault(str(folder), problem, fix, code="evaluation.unknown_order"))
