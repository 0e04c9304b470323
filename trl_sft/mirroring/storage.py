"""The storage behind a URL: files are written, verified, read and removed there.

Inputs: a URL of `run.mirror`. Outputs: files there; for an exception of any storage library a problem and what to do.
`fsspec` opens the URL, with the package of its scheme (`s3fs` for s3), and takes credentials from where that package
looks for them: environment variables and the files of the service. Not here: what the files are (`snapshot`).
"""

from __future__ import annotations

import hashlib
import secrets
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import fsspec
from fsspec.callbacks import Callback

from trl_sft import redaction
from trl_sft.errors import Fault, LaunchError, first_line

PART = 50 * 2**20  # bytes of a part of an upload to S3
_S3 = ("s3", "s3a")
# Services whose file systems have real folders, which have to exist; in an object store a path is only a name.
_WITH_FOLDERS = ("sftp", "ssh", "smb", "webdav", "hdfs", "webhdfs", "arrow_hdfs", "dropbox", "box", "gdrive")
_SECONDS = 60.0  # until a storage counts as out of reach
_TRIAL = ".trl_sft-trial-"  # begins the name of the file that is written, read and removed before training
# words in the names of exceptions and in their texts -> the kind of problem
_REFUSED = (
    *("accessdenied", "forbidden", "invalidaccesskeyid", "signaturedoesnotmatch", "nocredentials", "unauthorized"),
    *("permission", "unable to locate credentials", "gatedrepo", "401 client", "403 client"),
)
_ABSENT = ("nosuchbucket", "bucket does not exist", "repositorynotfound", "repository not found")
_UNREACHED = (
    *("endpointconnection", "connecttimeout", "connectionerror", "connecterror", "could not connect", "timeout"),
    *("name or service not known", "connection refused", "offlinemode", "cannot connect", "not answer"),
)


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
        options = {"chunksize": PART} if get_scheme(self.url) in _S3 else {}
        self._files.put_file(str(path), self._join(name), callback=_Counter(count), **options)
        self._verify(name, digest)
        return digest

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
        """Tell whether everybody can read the storage: of a repository of the hub; others do not say."""
        if get_scheme(self.url) != "hf":
            return False
        from huggingface_hub import HfApi

        path = self._files.resolve_path(self._root)
        if not hasattr(path, "repo_id"):  # a bucket
            return False
        api = HfApi(endpoint=self._files.endpoint, token=self._files.token)
        return not api.repo_info(path.repo_id, repo_type=path.repo_type).private

    def _verify(self, name: str, digest: FileDigest) -> None:
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


def open_storage(url: str, where: str) -> Storage:
    """Open the storage of `run.mirror`, and write, read and remove a small file there.

    Args:
        url: of `run.mirror`.
        where: the place of the key, for a fault.

    Raises:
        LaunchError: It is out of reach, refuses, or lacks a package.

    """
    outcome: list[Storage | BaseException] = []

    def work() -> None:
        try:
            storage = Storage(url)
            storage.try_out()
            if storage.is_public():
                outcome.append(
                    _PublicStorage(f"{url} can be read by everybody, and a mirror holds answers to your rows")
                )
            outcome.append(storage)
        except BaseException as error:
            outcome.append(error)

    worker = threading.Thread(target=work, name="mirror", daemon=True)  # a client may wait for many minutes
    worker.start()
    worker.join(_SECONDS)
    result = outcome[0] if outcome else TimeoutError(f"it did not answer within {_SECONDS:.0f} s")
    if isinstance(result, Storage):
        return result
    raise LaunchError(explain(result, url, where)) from None


class _PublicStorage(Exception):
    """Everybody can read the storage."""


def explain(error: BaseException, url: str, where: str) -> Fault:
    """Return the fault of an exception of a storage library, without secrets.

    Args:
        error: The exception.
        url: of `run.mirror`.
        where: the place of the key.

    """
    reason, scheme = describe(error), get_scheme(url)
    text = f"{type(error).__name__} {error}".lower()
    if isinstance(error, ImportError):
        package = {"s3": "trl-sft[mirror]", "s3a": "trl-sft[mirror]", "gs": "gcsfs", "gcs": "gcsfs"}.get(scheme)
        package = package or {"az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}.get(scheme, "")
        problem = f"`{scheme}://` needs a package that is not installed: {reason}"
        fix = f"Run `pip install '{package}'` in this Python environment." if package else f"Install it: {reason}."
        return Fault(where, problem, fix, code="package.missing")
    if isinstance(error, _PublicStorage):
        fix = "Make the repository private in its settings, or name another one."
        return Fault(where, str(error), fix, code="mirror.public")
    if isinstance(error, PermissionError) or any(word in text for word in _REFUSED):
        fix = {
            "hf": "Run `hf auth login`, or set HF_TOKEN to a token that may write there.",
            **dict.fromkeys(
                _S3, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to one that may write."
            ),
        }.get(scheme, "Correct the permissions there, or name another place.")
        return Fault(where, f"{url} refuses to be written to: {reason}", fix, code="mirror.refused")
    if any(word in text for word in _UNREACHED):
        fix = "Check the network and the address, then run the same command again; or remove `run.mirror`."
        return Fault(where, f"{url} cannot be reached: {reason}", fix, code="mirror.unreached")
    if isinstance(error, FileNotFoundError) or any(word in text for word in _ABSENT):
        kind = {"hf": "repository", **dict.fromkeys(_S3, "bucket")}.get(scheme, "place")
        problem = f"{url}: there is no such {kind}: {reason}"
        return Fault(where, problem, f"Create the {kind}, or correct its name.", code="mirror.absent")
    fix = "Name a place in which files can be written: s3://BUCKET/PATH, hf://OWNER/NAME/PATH or file:///PATH."
    return Fault(where, f"{url} cannot be written to: {reason}", fix, code="mirror.refused")


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
