"""The storage of `run.mirror` is opened, and an exception of any storage library becomes a fault.

Inputs: a URL. Outputs: an open storage into which a small file could be written; for an exception a problem and what to
do. Not here: the files there (`storage`, `hub_storage`).
"""

from __future__ import annotations

import errno
import threading

from trl_sft.errors import Fault, LaunchError
from trl_sft.mirroring.hub_storage import HubStorage
from trl_sft.mirroring.storage import S3, Storage, describe, get_scheme

_SECONDS = 60.0  # until a storage counts as out of reach
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


_FULL = ("no space left", "quota", "insufficientstorage", "storage limit", "entitytoolarge", "disk full", "507 ")
_FULL_NUMBERS = (errno.ENOSPC, errno.EDQUOT)
_PACKAGES = {  # scheme -> what pip installs
    **dict.fromkeys(S3, "trl-sft[mirror]"),
    **dict.fromkeys(("gs", "gcs"), "gcsfs"),
    **dict.fromkeys(("az", "abfs", "abfss", "adl"), "adlfs"),
    **dict.fromkeys(("sftp", "ssh"), "paramiko"),
    "smb": "smbprotocol",
    "webdav": "webdav4",
    "oss": "ossfs",
    "dropbox": "dropboxdrivefs",
    "gdrive": "gdrive_fsspec",
    "box": "boxfs",
    "oci": "ocifs",
}


def connect(url: str) -> Storage:
    """Return the storage at a URL of `run.mirror`; nothing is read or written."""
    return HubStorage(url) if get_scheme(url) == "hf" else Storage(url)


def is_full(error: BaseException) -> bool:
    """Tell whether an exception says that a storage has no space left."""
    text = f"{type(error).__name__} {error}".lower()
    return getattr(error, "errno", None) in _FULL_NUMBERS or any(word in text for word in _FULL)


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
            storage = connect(url)
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
        package = _PACKAGES.get(scheme, "")
        problem = f"`{scheme}://` needs a package that is not installed: {reason}"
        fix = f"Run `pip install '{package}'` in this Python environment." if package else f"Install it: {reason}."
        return Fault(where, problem, fix, code="package.missing")
    if is_full(error):
        fix = "Free space there, or name another place."
        return Fault(where, f"{url} is full: {reason}", fix, code="mirror.full")
    if isinstance(error, _PublicStorage):
        fix = "Make the repository private in its settings, or name another one."
        return Fault(where, str(error), fix, code="mirror.public")
    if isinstance(error, FileNotFoundError) or any(word in text for word in _ABSENT):  # the hub's text names rights too
        kind = {"hf": "repository", **dict.fromkeys(S3, "bucket")}.get(scheme, "place")
        problem = f"{url}: there is no such {kind}: {reason}"
        fix = f"Create the {kind}, or correct its name."
        if scheme == "hf":
            fix = (
                "Create the repository, correct its name, or run `hf auth login`: a private one looks absent to others."
            )
        return Fault(where, problem, fix, code="mirror.absent")
    if isinstance(error, PermissionError) or any(word in text for word in _REFUSED):
        fix = {
            "hf": "Run `hf auth login`, or set HF_TOKEN to a token that may write there.",
            **dict.fromkeys(
                S3, "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, to one that may write."
            ),
        }.get(scheme, "Correct the permissions there, or name another place.")
        return Fault(where, f"{url} refuses to be written to: {reason}", fix, code="mirror.refused")
    if any(word in text for word in _UNREACHED):
        fix = "Check the network and the address, then run the same command again; or remove `run.mirror`."
        return Fault(where, f"{url} cannot be reached: {reason}", fix, code="mirror.unreached")
    fix = "Name a place in which files can be written: s3://BUCKET/PATH, hf://OWNER/NAME/PATH or file:///PATH."
    return Fault(where, f"{url} cannot be written to: {reason}", fix, code="mirror.refused")
