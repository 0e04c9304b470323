"""The storage behind a URL: files are written, verified, read and removed there.

Inputs: a URL of `run.mirror`. Outputs: files there. `fsspec` opens the URL, with the package of its scheme (`s3fs` for
s3), and takes credentials from where that package looks for them: environment variables and the files of the service.
Not here: repositories of the hub (`hub_storage`), what the files are (`snapshot`), the faults of a storage (`access`).
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.callbacks import Callback

from trl_sft import redaction
from trl_sft.errors import first_line

PART = 50 * 2**20  # bytes of a part of an upload to S3
S3 = ("s3", "s3a")
# Services whose file systems have real folders, which have to exist; in an object store a path is only a name.
_WITH_FOLDERS = ("sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "arrow_hdfs", "dropbox", "box", "gdrive")
_TRIAL = ".trl_sft-trial-"  # begins the name of the file that is written, read and removed before training


class FileDigest(NamedTuple):
    """What a copy of a file is compared with."""

    size: int  # bytes
    sha256: str
    etag: str  # that S3 gives the file when it is uploaded in parts of `PART` bytes


class DamagedCopy(Exception):
    """A copy has other bytes than the file."""


class Storage:
    """The folder at a URL."""

    def __init__(self, url: str) -> None:
        """Open the file system of a URL; nothing is read or written.

        Args:
            url: `s3://BUCKET/PATH`, `hf://OWNER/NAME/PATH`, `file:///PATH` or another that fsspec opens.

        """
        self.url = url.rstrip("/")
        options = {"auto_mkdir": True} if get_scheme(url) in ("file", "local") else {}
        self._files, root = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        self._root = root.rstrip("/")

    def list_folders(self) -> list[str]:
        """Return the names of the folders in this one."""
        self._files.invalidate_cache()
        try:
            entries = self._files.ls(self._root, detail=True)
        except FileNotFoundError:
            return []
        return sorted(entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "directory")

    def exists(self, name: str) -> bool:
        """Tell whether there is a file of this name."""
        self._files.invalidate_cache()
        return bool(self._files.isfile(self._join(name)))

    def read(self, name: str) -> bytes:
        """Return the bytes of a file."""
        return bytes(self._files.cat_file(self._join(name)))

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""
        self._make_parent(name)
        self._files.pipe_file(self._join(name), content)

    def remove(self, name: str) -> None:
        """Remove a file or a folder with all files in it; nothing if there is none."""
        self._files.invalidate_cache()
        try:
            self._files.rm(self._join(name), recursive=True)
        except FileNotFoundError:
            return
        finally:
            self._files.invalidate_cache()

    def upload(self, path: Path, name: str, *, count: Callable[[int], None]) -> FileDigest:
        """Copy a file to the storage, and compare the copy with the file.

        Args:
            path: The file.
            name: Its name there.
            count: Is called with the number of bytes that were sent since the last call.

        Returns:
            The digest of the file.

        Raises:
            DamagedCopy: The copy has other bytes.

        """
        digest = digest_file(path)
        self._make_parent(name)
        options = {"chunksize": PART} if get_scheme(self.url) in S3 else {}
        self._files.put_file(str(path), self._join(name), callback=_Counter(count), **options)
        self.verify(name, digest)
        return digest

    def upload_files(self, folder: str, files: Mapping[str, Path], *, count: Callable[[int], None]) -> list[FileDigest]:
        """Copy files into a folder of the storage, and compare each copy with its file.

        Args:
            folder: The name of the folder there.
            files: name in the folder -> local file.
            count: Is called with the number of bytes that were sent since the last call.

        Returns:
            The digests of the files, in their order.

        Raises:
            DamagedCopy: A copy has other bytes.

        """
        return [self.upload(path, f"{folder}/{name}", count=count) for name, path in files.items()]

    def download(self, name: str, path: Path, expected: FileDigest, *, count: Callable[[int], None]) -> None:
        """Copy a file from the storage, and compare its bytes with those that were uploaded. Raises DamagedCopy."""
        path.parent.mkdir(parents=True, exist_ok=True)
        sha256, size = hashlib.sha256(), 0
        with path.open("wb") as file:
            for block in self._read_blocks(name):
                file.write(block)
                sha256.update(block)
                size += len(block)
                count(len(block))
        if (size, sha256.hexdigest()) != (expected.size, expected.sha256):
            raise DamagedCopy(f"{self.url}/{name} has other bytes than when it was uploaded")

    def try_out(self) -> None:
        """Write a small file, read it and remove it, so that a refusal is known before training."""
        name, content = _TRIAL + secrets.token_hex(8), secrets.token_bytes(64)
        self.write(name, content)
        try:
            if self.read(name) != content:
                raise DamagedCopy("a small file is read back with other bytes than were written")
        finally:
            self.remove(name)

    def is_public(self) -> bool:
        """Tell whether everybody can read the storage; most do not say, and count as private."""
        return False

    def verify(self, name: str, digest: FileDigest) -> None:
        """Compare a copy with the digest of its file: by a hash that the storage computed, or by reading it back."""
        self._files.invalidate_cache()
        entry = self._files.info(self._join(name))
        if (size := entry.get("size")) is not None and size != digest.size:
            raise DamagedCopy(f"{name} has {size:,} of {digest.size:,} bytes there")
        stored = entry.get("lfs")  # the hub computes the SHA-256 of large files
        if stored is not None and _read_sha256(stored) == digest.sha256:
            return
        if str(entry.get("ETag", "")).strip('"') == digest.etag:  # MD5, which S3 computes from what it stored
            return
        sha256 = hashlib.sha256()
        for block in self._read_blocks(name):
            sha256.update(block)
        if sha256.hexdigest() != digest.sha256:
            raise DamagedCopy(f"{name} has other bytes there")

    def _read_blocks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes of a file in blocks."""
        with self._files.open(self._join(name), "rb") as file:
            while block := file.read(2**22):
                yield block

    def _make_parent(self, name: str) -> None:
        """Make the folder of a file, where the service has folders."""
        if get_scheme(self.url) in _WITH_FOLDERS:
            self._files.makedirs(self._join(name).rpartition("/")[0], exist_ok=True)

    def _join(self, name: str) -> str:
        return f"{self._root}/{name}"


class _Counter(Callback):  # type: ignore[misc]
    """Passes on how many bytes were sent."""

    def __init__(self, count: Callable[[int], None]) -> None:
        super().__init__()
        self._count, self._sent = count, 0

    def call(self, *_: Any, **__: Any) -> None:
        """Pass on the bytes since the last call."""
        self._count(self.value - self._sent)
        self._sent = self.value


def digest_file(path: Path) -> FileDigest:
    """Return size and hashes of a file, which is read once."""
    sha256, parts, size = hashlib.sha256(), [], 0
    with path.open("rb") as file:
        while part := file.read(PART):
            sha256.update(part)
            parts.append(hashlib.md5(part, usedforsecurity=False).digest())
            size += len(part)
    etag = hashlib.md5(b"".join(parts), usedforsecurity=False).hexdigest() + f"-{len(parts)}"
    if size < 2 * PART:  # s3fs sends it as one part
        etag = _digest_whole(path)
    return FileDigest(size, sha256.hexdigest(), etag)


def get_scheme(url: str) -> str:
    """Return what stands before `://`; "" = the text is no URL."""
    return url.partition("://")[0].lower() if "://" in url else ""


def describe(error: BaseException) -> str:
    """Return the first line of an exception without secrets; its name where it has no text."""
    return redaction.redact_shapes(first_line(error))


def _digest_whole(path: Path) -> str:
    """Return the MD5 of a file, which is the ETag of a file in one part."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def _read_sha256(stored: Any) -> str | None:
    """Return the SHA-256 in what the hub says about a large file."""
    value = stored.get("sha256") if isinstance(stored, dict) else getattr(stored, "sha256", None)
    return None if value is None else str(value)
