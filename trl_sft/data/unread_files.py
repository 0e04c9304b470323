"""What a run does not read of a folder or of a data set of the hub: files of other kinds, and other splits.

Inputs: a source, its rows, and the run, of which several sources may read the same folder. Outputs: lines for the
screen, each with the key that reads what is left. Deliberately not here: which files belong to a split (`folder`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from trl_sft.data import load
from trl_sft.data.source_rows import SourceRows
from trl_sft.recipe import sections
from trl_sft.recipe.checked import Run, Source


def write_notes(run: Run, source: Source, rows: SourceRows) -> Iterator[str]:
    """Yield the notes on what is not read of a source.

    Args:
        run: the checked recipe.
        source: a folder, or a data set of the hub.
        rows: its rows.

    """
    if rows.unread_files:
        yield _note_files(source, rows.unread_files)
    sources = [other for part in run.sources.values() for other in part]
    readers = [other for other in sources if not other.builder and other.location == source.location]
    read = {name for reader in readers for name in load.list_read_splits(reader)}
    if others := {name: files for name, files in rows.splits.items() if name not in read}:
        yield _note_splits(source, others)


def _note_files(source: Source, files: Sequence[str]) -> str:
    """Return a note on the files of a folder that are not read, with the pattern that reads those that hold data."""
    number = "1 file" if len(files) == 1 else f"{len(files):,} files"
    note = f"{source.name}: {number} NOT READ: {_list_names(files)}"
    suffix = next((suffix for name in files if (suffix := Path(name).suffix.lower()) in sections.BUILDERS), "")
    if not suffix:
        return f"{note}; a recipe reads no files of these types"
    rule = "in a folder, `datasets` reads files of one type, by the split in their name, as in train.jsonl"
    return f"{note}; {rule}. Set `path` to {source.location.name}/**/*{suffix} to read all {suffix} files."


def _note_splits(source: Source, splits: Mapping[str, Sequence[str]]) -> str:
    """Return a note on the splits of a source that are not read, with the keys that read them."""
    is_folder = bool(source.location.files)
    names = [f"{name} ({_list_names(files)})" if is_folder else name for name, files in splits.items()]
    title = f"the split {names[0]} is" if len(names) == 1 else f"the splits {' and '.join(names)} are"
    note = f"{source.name}: {title} NOT READ"
    first = next(iter(splits))
    if source.key[1] != "train":
        return f"{note}. Set `split: {first}` in the source to read it."
    return (
        f"{note}. To evaluate on {first}, set `data.eval: {{path: {source.location.name}, split: {first}}}`; to train "
        f"on it too, set `split: {source.load_kwargs.get('split', 'train')}+{first}` in the source."
    )


def _list_names(names: Sequence[str], shown: int = 3) -> str:
    """Return the first names of files, and how many more there are."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    return f"{', '.join(names[:shown])}{more}"
