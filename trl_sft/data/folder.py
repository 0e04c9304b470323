"""The files of a folder that is a source: which of them are documents, and which are not read at all.

Inputs: a folder on this machine. Outputs: its text files by split, where they are what it has to read; and the files
that nothing reads. Deliberately not here: reading, and which files `datasets` chooses where a folder has tables.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE

from trl_sft.data import hub_files
from trl_sft.data.file_diagnosis import diagnose
from trl_sft.data.hub_files import SourceFiles
from trl_sft.data.readers.data_file import DataFile
from trl_sft.errors import DataError, Fault
from trl_sft.recipe import sections
from trl_sft.recipe.checked import Source
from trl_sft.recipe.yaml_reader import Recipe
from trl_sft.row_progress import RowProgress

DOCUMENT_SUFFIXES = (".txt", ".md")
# What stands beside data and is no data: cards, licences, what Git and other tools write
_NO_DATA = {*FILES_TO_IGNORE, "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "CITATION.cff"}
_HIDDEN = (".", "__")  # how the names of hidden files and folders begin
# names of files and folders that `datasets` takes for a split (`datasets.data_files`)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find_documents(folder: Path, files: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Return the text files of a folder by split; None = the folder has tables, which `datasets` chooses and reads.

    `datasets` reads `.txt` files line by line, and takes `.md` files for another kind of data set.

    Args:
        folder: the folder.
        files: its files, as `list_files` returns them.

    """
    suffixes = _count_suffixes(files)
    if not suffixes.keys() & set(DOCUMENT_SUFFIXES) or _count_tables(files):
        return None
    documents = [file for file in files if {suffix.lower() for suffix in file.suffixes} & set(DOCUMENT_SUFFIXES)]
    splits: dict[str, list[Path]] = {}
    for file in documents:
        splits.setdefault(_find_split(file.relative_to(folder)), []).append(file)
    return splits


def _find_split(file: Path) -> str:
    """Return the split that a document belongs to: that of its folder or of its whole name, else train."""
    for name in (file.parts[0], file.name):
        split = _SPLITS.get(name.partition(".")[0].lower())
        if split:
            return split
    return "train"


def _count_tables(files: Sequence[Path]) -> dict[str, int]:
    """Return suffix -> number of the files that hold tables, the most frequent first."""
    tables = set(sections.BUILDERS) - set(DOCUMENT_SUFFIXES)
    return {suffix: number for suffix, number in _count_suffixes(files).most_common() if suffix in tables}


def _count_suffixes(files: Sequence[Path]) -> Counter[str]:
    """Return suffix in small letters -> number of files that have it; a file may have several."""
    return Counter(suffix.lower() for file in files for suffix in file.suffixes)


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, in order, without hidden ones and those beside data."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(_HIDDEN)]
        files += [Path(parent, name) for name in names if not name.startswith(_HIDDEN) and name not in _NO_DATA]
    return sorted(file for file in files if file.is_file())


def find_unread(folder: Path, files: Sequence[Path], read_files: Collection[str]) -> tuple[str, ...]:
    """Return the names of the files of a folder that are not read, relative to it.

    Args:
        folder: the folder.
        files: its files, as `list_files` returns them.
        read_files: the paths of those that are read.

    """
    return tuple(str(file.relative_to(folder)) for file in files if str(file) not in read_files)


def make_document_files(
    recipe: Recipe, source: Source, documents: Mapping[str, Sequence[Path]], *, every: Sequence[Path]
) -> SourceFiles:
    """Return the text files of a folder; each is one row, unless `sample_by` says otherwise. Raises DataError.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the source that is the folder.
        documents: its text files by split.
        every: all its files.

    """
    path = source.location.files[0]
    read_files = [file for files in documents.values() for file in files]
    check_heads(recipe, source, read_files)
    splits = {
        split: [DataFile(str(file.relative_to(path)), str(file)) for file in files]
        for split, files in documents.items()
    }
    keywords = hub_files.select_builder_keywords(source)
    unread = find_unread(path, every, set(map(str, read_files)))
    return SourceFiles("text", splits, {"sample_by": "document"} | keywords, unread=unread)


def check(
    recipe: Recipe, source: Source, *, builder_name: str, files: Sequence[Path], read_files: Sequence[Path]
) -> None:
    """Refuse a folder that `datasets` takes for another kind of data, or whose files are no data.

    Args:
        recipe: the recipe, for the place of a fault.
        source: the source that is the folder.
        builder_name: the builder that `datasets` chose for it.
        files: all files of the folder, as `list_files` returns them.
        read_files: the files that this builder reads.

    Raises:
        DataError: with what to write instead.

    """
    tables = _count_tables(files)
    if tables and builder_name not in sections.BUILDERS.values():
        kinds = ", ".join(f"{number:,} {suffix}" for suffix, number in tables.items())
        problem = f"{source.name} holds tables ({kinds}), but `datasets` takes its files for {builder_name}"
        path = str(diagnose.read_entry(recipe, source)["path"]).rstrip("/")
        fix = f"Set `path: {path}/**/*{next(iter(tables))}`."
        raise DataError(Fault(recipe.where(source.key), problem, fix, code="data.unreadable_source"))
    if builder_name.endswith("folder"):  # imagefolder, pdffolder, ...
        raise DataError(explain_no_data(recipe, source))
    check_heads(recipe, source, [file for file in read_files if file.is_file()])


def check_heads(recipe: Recipe, source: Source, files: Sequence[Path]) -> None:
    """Refuse files whose first bytes show that they are no data. Raises DataError with the faults of the first."""
    with RowProgress("Looking at files", len(files), unit="files") as progress:
        for file in files:
            if faults := diagnose.check_head(recipe, source, file):
                raise DataError(faults)
            progress.update(1)


def explain_no_data(recipe: Recipe, source: Source) -> Fault:
    """Return the fault of a folder in which nothing can be read, with the files that it has."""
    names = [str(file.relative_to(source.location.files[0])) for file in list_files(source.location.files[0])]
    content = "it is empty" if not names else f"it has {', '.join(names[:3])}"
    more = f" and {len(names) - 3:,} more" if len(names) > len(names[:3]) else ""
    problem = f"{source.name} holds no file that a recipe reads: {content}{more}"
    fix = f"Name a folder with files that end in one of {', '.join(sections.BUILDERS)}."
    return Fault(recipe.where(source.key), problem, fix, code="data.no_rows")
