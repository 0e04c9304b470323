"""The kind of a file by its first bytes: a text, a compressed text, or something else in place of data.

Inputs: the path of a file. Outputs: its bytes, decompressed; or a `Content` that says what it is instead of what its
suffix promises, with the instruction that mends it. Deliberately not here: encodings (`encodings`) and the text itself
(`json_text`, `table`).
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from trl_sft.console import format_bytes
from trl_sft.data.file_diagnosis import server_answers
from trl_sft.data.readers import data_file
from trl_sft.data.readers.data_file import CompressionError

HEAD = 4096  # bytes that are read of a file before it is read as a whole
_MOST_UNPACKED = 1 << 30  # bytes of a compressed file that are tried after its reader failed
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_XET_POINTER = b"# xet version"
_PARQUET = b"PAR1"  # the first and the last bytes of a Parquet file
_SAVE_AS_JSONL = "Save its rows as JSON lines or as Parquet"


class Content(NamedTuple):
    """What a file is, in place of what its suffix promises."""

    problem: str  # what the file is, as the end of a sentence that begins with its name
    fix: str
    code: str = "data.other_content"  # the kind of fault


class _Signature(NamedTuple):
    """The first bytes of a kind of file."""

    offset: int
    start: bytes
    title: str  # with its article
    suffixes: tuple[str, ...] = ()  # that a recipe reads; () = it reads none of this kind
    tool: str = ""  # what to do with it, where a recipe does not read it


_SIGNATURES = (
    _Signature(0, _PARQUET, "a Parquet file", (".parquet",)),
    _Signature(0, b"ARROW1\0\0", "an Arrow file", (".arrow",)),
    _Signature(0, b"\xff\xff\xff\xff", "an Arrow stream", (".arrow",)),
    _Signature(0, b"FEA1", "a Feather file of the first version", (), "Save it with `pandas.read_feather`"),
    _Signature(0, b"SQLite format 3\0", "an SQLite database", (), "Export its table as CSV or JSON lines"),
    _Signature(0, b"Obj\x01", "an Avro file", (), _SAVE_AS_JSONL),
    _Signature(0, b"ORC", "an ORC file", (), _SAVE_AS_JSONL),
    _Signature(0, b"\x89HDF\r\n", "an HDF5 file", (), _SAVE_AS_JSONL),
    _Signature(0, b"\x93NUMPY", "a NumPy array", (), _SAVE_AS_JSONL),
    _Signature(0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document (.xls, .doc)", (), "Save it as CSV"),
    _Signature(0, b"%PDF-", "a PDF", (), "Extract its text"),
    _Signature(0, b"{\\rtf", "an RTF document", (), "Save it as plain text"),
    _Signature(0, b"\x89PNG\r\n", "a PNG image", (), "Name a file of text"),
    _Signature(0, b"\xff\xd8\xff", "a JPEG image", (), "Name a file of text"),
    _Signature(0, b"GIF8", "a GIF image", (), "Name a file of text"),
    _Signature(0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", (), "Unpack it"),
    _Signature(0, b"Rar!\x1a\x07", "a RAR archive", (), "Unpack it"),
    _Signature(257, b"ustar", "a tar archive", (), "Unpack it"),
)
_BEFORE_TEXT = b"\xef\xbb\xbf \t\r\n"  # the mark of UTF-8, and whitespace
_PICKLE = re.compile(rb"\x80[\x02-\x05](\x95|[}\]cq(])")


def find_foreign_content(path: Path, builder: str, head: bytes, *, is_text: bool = False) -> Content | None:
    """Return what a file is, if it is not what its suffix promises.

    Args:
        path: the file.
        builder: the builder of `datasets` that its suffix names: json, csv, text, parquet or arrow.
        head: its first bytes, as `read_head` returns them.
        is_text: whether the recipe says that the file is text, which may hold markup.

    Returns:
        None = the file may be what its suffix promises.

    """
    pointer = _find_pointer(path, head)
    if pointer:
        return pointer
    for signature in _SIGNATURES:
        if head[signature.offset :].startswith(signature.start):
            if not _reads(builder, signature):
                return _describe_signature(path, signature)
            return _find_lost_end(path) if builder == "parquet" else None
    if _PICKLE.match(head):
        return Content("is a Python pickle", f"{_SAVE_AS_JSONL}: a pickle can run code when it is read.")
    if inner := data_file.find_compression(head):  # of a file that is decompressed already, or of a zip archive
        return _describe_zip(path) if inner == "zip" and _is_zip_itself(path) else _describe_nested(inner)
    if builder in ("parquet", "arrow"):
        return _describe_other(path, head, builder)
    if len(head) > server_answers.MAX_LINE and not head.lstrip(_BEFORE_TEXT).startswith(b"<"):
        return None
    answer = server_answers.find_markup(head, builder, is_text=is_text)
    return Content(*answer) if answer else None


def read_head(path: Path) -> bytes:
    """Return the first `HEAD` bytes of a file, decompressed; of a zip archive as they are. Raises CompressionError."""
    with open_bytes(path) as data:
        try:
            return data.read(HEAD)
        except Exception:  # of each decompressor its own; `find_compression_fault` says what is wrong
            return b""


def is_zip(head: bytes) -> bool:
    """Tell whether a file with this beginning is a zip archive."""
    return head.startswith((b"PK\x03\x04", b"PK\x05\x06"))


@contextmanager
def open_bytes(path: Path) -> Iterator[IO[bytes]]:
    """Open a file for reading bytes, decompressed; a zip archive as it is. Raises CompressionError."""
    with path.open("rb") as raw:
        yield data_file.decompress(raw)


def describe_missing_decompressor(error: CompressionError) -> Content:
    """Return the problem of a file that no installed package decompresses."""
    return Content(f"cannot be read: {error}", error.fix, code="data.missing_decompressor")


def find_compression_fault(path: Path) -> Content | None:
    """Return the problem of a compressed file that cannot be unpacked to its end; None = it can."""
    try:
        with path.open("rb") as raw:
            data = data_file.decompress(raw)
            for _ in range(_MOST_UNPACKED >> 20):
                if not data.read(1 << 20):
                    break
    except CompressionError as error:
        return describe_missing_decompressor(error)
    except Exception as error:  # of each decompressor its own
        if isinstance(error, EOFError) or "ended before" in str(error):
            problem = "is compressed and ends too early: it was not copied to its end"
            return Content(problem, "Download or copy the file again.", code="data.truncated_file")
        fix = "Download or copy the file again."
        return Content(f"cannot be decompressed: {error}", fix, code="data.truncated_file")
    return None


def _is_zip_itself(path: Path) -> bool:
    """Tell whether a file is a zip archive, and not only what it holds is one."""
    with path.open("rb") as raw:
        return is_zip(raw.read(4))


def _describe_nested(inner: str) -> Content:
    """Return the problem of a compressed file whose content is compressed too."""
    fix = "Decompress it until its rows can be read, and compress them once."
    return Content(f"is compressed more than once: it holds a file compressed with {inner}", fix)


def _find_lost_end(path: Path) -> Content | None:
    """Return the problem of a Parquet file that does not end as it begins; None = it does."""
    with path.open("rb") as file:
        file.seek(-len(_PARQUET), 2)
        if file.read() == _PARQUET:
            return None
    problem = "is a Parquet file that ends too early: it was not copied to its end"
    return Content(problem, "Download or copy the file again.", code="data.truncated_file")


def _reads(builder: str, signature: _Signature) -> bool:
    """Tell whether a builder reads files of a kind."""
    return f".{builder}" in signature.suffixes


def _describe_signature(path: Path, signature: _Signature) -> Content:
    """Return what a file with a known signature is."""
    problem = f"is {signature.title}, not what its suffix promises"
    if signature.suffixes:
        name = path.with_name(path.name.partition(".")[0] + signature.suffixes[0]).name
        return Content(problem, f"Rename the file to {name}.")
    if signature.tool == _SAVE_AS_JSONL:
        return Content(problem, f"{signature.tool}.")
    return Content(problem, f"{signature.tool}, and name the file of rows.")


def _find_pointer(path: Path, head: bytes) -> Content | None:
    """Return the problem of a Git LFS or Xet pointer, the small text that stands for a file that was not downloaded."""
    fix = "Download the data set with `hf download --repo-type dataset OWNER/NAME`."
    if head.startswith(_LFS_POINTER):
        title = "Git LFS"
        size = re.search(rb"^size (\d+)", head, re.M)
        fix = f"Run `git lfs pull` in {path.parent}, or d{fix[1:]}"
    elif head.startswith(_XET_POINTER):
        title = "Git Xet"
        size = re.search(rb"^filesize = (\d+)", head, re.M)
    else:
        return None
    of_size = f" of {format_bytes(int(size[1]))}" if size else ""
    problem = f"is a {title} pointer: the data{of_size} was not downloaded"
    return Content(problem, fix, code="data.not_downloaded")


def _describe_zip(path: Path) -> Content | None:
    """Return what a zip archive is; None = it holds plain files, which `datasets` unpacks."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            inner = _find_inner_compression(archive, names)
    except (zipfile.BadZipFile, OSError):
        return Content("is a damaged zip archive", "Download or copy the file again.", code="data.truncated_file")
    if any(name.startswith("xl/") for name in names):
        return Content("is an Excel workbook", "Save its sheet as CSV (UTF-8), and name that file.")
    if any(name.startswith("word/") for name in names):
        return Content("is a Word document", "Save it as plain text (UTF-8), and name that file.")
    if any(name.endswith("data.pkl") for name in names):
        return Content("is a file of torch.save", "Name a file of rows.")
    if any(name.endswith(".npy") for name in names):
        return Content("is a NumPy archive", f"{_SAVE_AS_JSONL}.")
    return _describe_nested(inner) if inner else None


def _find_inner_compression(archive: zipfile.ZipFile, names: Sequence[str]) -> str:
    """Return the compression of the one file in an archive; "" = it has none, or cannot be read."""
    try:
        with archive.open(names[0]) as member:
            return data_file.find_compression(member.read(HEAD)) if len(names) == 1 else ""
    except Exception:  # of each decompressor its own; the reader says what is wrong
        return ""


def _describe_other(path: Path, head: bytes, builder: str) -> Content:
    """Return what stands in a file that has the suffix of a binary format but not its first bytes."""
    kind = {"parquet": "Parquet", "arrow": "Arrow"}[builder]
    answer = server_answers.find_markup(head, builder)
    if answer:
        return Content(*answer)
    stem = path.name.partition(".")[0]
    start = head.lstrip(_BEFORE_TEXT)
    if start.startswith((b"{", b"[")):
        return Content(f"is JSON, not {kind}", f"Rename the file to {stem}.jsonl.")
    if not head:
        return Content("is empty: 0 bytes", "Name a file that has rows.", code="data.no_rows")
    return Content(f"does not begin as a {kind} file does", "Download or copy the file again, or correct its suffix.")
