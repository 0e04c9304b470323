"""The files of a folder that is a source: which of them are documents, and which are not read at all.

Inputs: a folder on this machine. Outputs: its text files by split, where they are what it has to read; and the files
that nothing reads. Deliberately not here: reading, and which files `datasets` chooses where a folder has tables.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from datasets.data_files import FILES_TO_IGNORE

from trl_sft.recipe import sections

DOCUMENT_SUFFIXES = (".txt", ".md")
# What stands beside data and is no data: cards, licences, what Git and other tools write
_NO_DATA = {*FILES_TO_IGNORE, "LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE", "NOTICE", "CITATION.cff"}
# names of files and folders that `datasets` takes for a split (`datasets.data_files`)
_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "dev", "val"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}


def find_documents(folder: Path) -> dict[str, list[Path]] | None:
    """Return the text files of a folder by split; None = the folder has tables, which `datasets` chooses and reads.

    `datasets` reads `.txt` files line by line, and takes `.md` files for another kind of data set.
    """
    files = list_files(folder)
    suffixes = {suffix.lower() for file in files for suffix in file.suffixes}
    if not suffixes & set(DOCUMENT_SUFFIXES) or suffixes & (set(sections.BUILDERS) - set(DOCUMENT_SUFFIXES)):
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


def list_files(folder: Path) -> list[Path]:
    """Return the files of a folder and of the folders in it, in order, without hidden ones and those beside data."""
    files = []
    for path in sorted(folder.rglob("*")):
        is_hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
        if path.is_file() and not is_hidden and path.name not in _NO_DATA:
            files.append(path)
    return files


def find_unread(folder: Path, read_files: Collection[Path]) -> list[str]:
    """Return the files of a folder that are not read, relative to it."""
    return [str(file.relative_to(folder)) for file in list_files(folder) if file not in read_files]


def describe_unread(names: list[str], shown: int = 3) -> str:
    """Return how many files are not read, with the first of their names."""
    more = f" and {len(names) - shown:,} more" if len(names) > shown else ""
    number = "1 file" if len(names) == 1 else f"{len(names):,} files"
    return f"{number} NOT READ: {', '.join(names[:shown])}{more}"
