"""Which process writes to a mirror: the last one that began, so that two never mix their copies.

Inputs: a storage. Outputs: `writer.json` there, and who wrote it last. An object store has no lock; a process looks
before each copy whether another one has begun since, as when a machine comes back that was given up, and then writes no
more. Not here: whether a run may use the mirror of another one (`fetch`).
"""

from __future__ import annotations

import datetime
import json
import secrets
import socket

from trl_sft.mirroring.storage import Storage

WRITER = "writer.json"
_PROCESS = secrets.token_hex(8)


class OtherWriter(Exception):
    """Another process writes to the mirror now."""


def claim(storage: Storage) -> None:
    """Write down that this process writes to the mirror from now on."""
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"process": _PROCESS, "host": socket.gethostname(), "began": began}
    storage.write(WRITER, json.dumps(record).encode())


def check(storage: Storage) -> None:
    """Raise OtherWriter if another process has claimed the mirror since."""
    try:
        record = json.loads(storage.read(WRITER))
    except (FileNotFoundError, ValueError):
        return
    if isinstance(record, dict) and record.get("process", _PROCESS) != _PROCESS:
        who = f"another process, on {record.get('host')} since {record.get('began')}"
        raise OtherWriter(f"{who}, writes to {storage.url} now")
