"""One data file: opened, decompressed, and digested by its content.

Inputs: a path on this machine, or an address that `datasets` can open. Outputs: streams of bytes or of text, and a
digest that changes with every byte of the file, whatever its time says. Deliberately not here: what the bytes mean.
"""

from __future__ import annotations

import bz2
import gzip
import importlib
import io
import lzma
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import xxhash
from datasets.utils.file_utils import xopen

from trl_sft.file_digests import hash_file

_BLOCK = 1 << 20  # bytes that are digested at once
# the first bytes of a compressed file
_GZIP, _BZIP2, _XZ, _ZSTD, _ZIP = b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"\x28\xb5\x2f\xfd", b"PK\x03\x04"
_COMPRESSIONS = {_GZIP: "gzip", _BZIP2: "bzip2", _XZ: "xz", _ZSTD: "Zstandard", _ZIP: "zip"}


class DataFile(NamedTuple):
    """A file of rows."""

    name: str  # for messages
    path: str  # absolute, or an address such as hf://datasets/...
    download_config: Any = None  # of `datasets`, for an address; None = the file is on this machine


class CompressionError(ValueError):
    """A compressed file that cannot be opened: `fix` says what to do."""

    def __init__(self, problem: str, fix: str) -> None:
        """Take what is wrong, and the instruction."""
        self.fix = fix
        super().__init__(problem)


@contextmanager
def open_bytes(file: DataFile) -> Iterator[IO[bytes]]:
    """Open a file as a stream of its decompressed bytes.

    The kind of compression is read from the first bytes: gzip, bzip2, xz, Zstandard, or a zip archive of one file.

    Raises:
        CompressionError: a package is missing, or an archive does not hold exactly one file.
        OSError: the file cannot be opened.

    """
    with _open_raw(file) as raw, _decompress(raw) as stream:
        yield stream


@contextmanager
def open_text(file: DataFile, encoding: str = "utf-8", errors: str = "strict") -> Iterator[IO[str]]:
    """Open a file as a stream of text without its byte order mark, whose line breaks are those of the file."""
    if encoding.lower().replace("_", "-") in ("utf-8", "utf8"):
        encoding = "utf-8-sig"  # without a byte order mark it is the same encoding
    with open_bytes(file) as stream:
        yield io.TextIOWrapper(stream, encoding=encoding, errors=errors, newline="")


def read_lines(stream: IO[str], longest: int) -> Iterator[str]:
    """Yield the lines of a stream; of a line that is longer than `longest`, so many characters and one more."""
    return iter(lambda: stream.readline(longest + 1), "")


def digest_file(file: DataFile) -> str:
    """Return the digest of the bytes of a file: its sha256; of one on the hub its 128-bit xxh3 and its size."""
    if file.download_config is None:
        return hash_file(Path(file.path))
    digest, size = xxhash.xxh3_128(), 0
    with _open_raw(file) as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return f"{digest.hexdigest()}-{size}"


def find_compression(begin: bytes) -> str:
    """Return the name of the compression of a file with these first bytes; "" = it is not compressed."""
    return next((name for start, name in _COMPRESSIONS.items() if begin.startswith(start)), "")


def count_line_breaks(text: str) -> int:
    r"""Return the number of line breaks as an editor counts them: \n, \r\n and \r, and no other character."""
    breaks = text.count("\n")
    if "\r" in text:
        breaks += text.count("\r") - text.count("\r\n")
    return breaks


def _open_raw(file: DataFile) -> IO[bytes]:
    """Open the bytes of a file as they lie on disk or on the hub."""
    if file.download_config is None:
        return Path(file.path).open("rb")
    return xopen(file.path, "rb", download_config=file.download_config)  # type: ignore[no-any-return]


@contextmanager
def _decompress(raw: IO[bytes]) -> Iterator[IO[bytes]]:
    """Yield the decompressed bytes of a stream; the stream itself where it is not compressed."""
    begin = raw.read(len(_XZ))
    raw.seek(0)
    if begin.startswith(_ZIP):
        with zipfile.ZipFile(raw) as archive, archive.open(_find_member(archive)) as member:
            yield member
        return
    yield decompress(raw)


def decompress(raw: IO[bytes]) -> IO[bytes]:
    """Return the decompressed bytes of a stream; the stream itself where it is not compressed, or is a zip archive.

    The first bytes decide, not the suffix, as in `datasets`. Raises CompressionError if no installed package reads it.
    """
    begin = raw.read(len(_XZ))
    raw.seek(0)
    opened: Any = raw
    if begin.startswith(_GZIP):
        opened = gzip.GzipFile(fileobj=raw)
    elif begin.startswith(_BZIP2):
        opened = bz2.BZ2File(raw)
    elif begin.startswith(_XZ):
        opened = lzma.LZMAFile(raw)  # noqa: SIM115 (closed by the caller's `with` of the raw file)
    elif begin.startswith(_ZSTD):
        opened = _open_zstandard(raw)
    return opened  # type: ignore[no-any-return]


def _find_member(archive: zipfile.ZipFile) -> str:
    """Return the name of the one file in a zip archive. Raises CompressionError."""
    names = [name for name in archive.namelist() if not name.endswith("/") and "__MACOSX" not in name]
    if len(names) != 1:
        problem = f"the archive holds {len(names)} files: {', '.join(names[:5])}"
        raise CompressionError(problem, "Unpack the archive, and name the files in `path`.")
    return names[0]


def _open_zstandard(raw: IO[bytes]) -> IO[bytes]:
    """Return the decompressed bytes of a Zstandard stream. Raises CompressionError without a package that reads it."""
    try:
        module = importlib.import_module("compression.zstd")  # Python 3.14
        return module.ZstdFile(raw)  # type: ignore[no-any-return]
    except ImportError:
        pass
    try:
        zstandard = importlib.import_module("zstandard")
    except ImportError:
        problem = "the file is compressed with Zstandard, and no installed package reads it"
        raise CompressionError(problem, "Run `pip install zstandard`, or decompress the file.") from None
    return io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
