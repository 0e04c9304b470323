"""Answers that were generated once, by model, prompt and decoding, in `answers.jsonl` of a run folder.

Inputs: keys and answers. Outputs: a file that only grows, one line an answer. A batch is on the disk before the next
one is generated, so a process that is killed loses one batch. A line that was half written is left out, and its prompt
is answered again. Not here: who generates (`generate`, `endpoint`), and digests of models (`cli.evaluate`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from trl_sft import redaction, run_folder

_LEAST_KEYS = {"key", "text", "stop"}


class StoredAnswer(NamedTuple):
    """An answer as the model wrote it."""

    text: str  # with its thought, without special tokens
    stop: str  # STOP_TOKEN, LIMIT or CONTEXT of `generate`
    tokens: int | None  # that were generated; None = a server did not say


class CacheCounts(NamedTuple):
    """How many answers were generated, and how many were in the file."""

    generated: int
    cached: int


def compute_key(model: str, prompt: Any, decoding: Mapping[str, Any]) -> str:
    """Return the key of an answer.

    Args:
        model: a digest of the weights and of what else decides their values.
        prompt: token ids, or what a server gets.
        decoding: how answers are decoded, with the seed of sampled ones.

    """
    text = json.dumps([model, prompt, dict(decoding)], sort_keys=True, ensure_ascii=False, default=str)
    return xxhash.xxh3_128(text.encode("utf-8", "surrogatepass")).hexdigest()


def fill(
    path: Path,
    keys: Sequence[str],
    generate: Callable[[list[int]], Iterable[Mapping[int, StoredAnswer]]],
    *,
    label: str,
) -> tuple[list[StoredAnswer], CacheCounts]:
    """Return an answer for each key: from the file, or generated and then added to the file.

    Args:
        path: of `answers.jsonl`; its folder exists.
        keys: one of each prompt; equal keys are one call.
        generate: gets the numbers of prompts without an answer, and yields the answers of each batch.
        label: which model answers, for readers of the file.

    """
    known = read(path)
    first_numbers: dict[str, int] = {}
    for number, key in enumerate(keys):
        first_numbers.setdefault(key, number)
    missing = [number for key, number in first_numbers.items() if key not in known]
    for batch in generate(missing) if missing else ():
        entries = [
            {"key": keys[number], "side": label, "text": answer.text, "stop": answer.stop, "tokens": answer.tokens}
            for number, answer in batch.items()
        ]
        known |= _append(path, entries)
    return [known[key] for key in keys], CacheCounts(len(missing), len(first_numbers) - len(missing))


def read(path: Path) -> dict[str, StoredAnswer]:
    """Return the answers of a file by their keys; lines that are damaged are left out."""
    try:
        lines = path.read_bytes().decode("utf-8", "replace").split("\n")
    except OSError:
        return {}
    return _read_lines(lines)


def _read_lines(lines: Iterable[str]) -> dict[str, StoredAnswer]:
    """Return the answers of lines; those that are damaged are left out."""
    answers = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and entry.keys() >= _LEAST_KEYS and isinstance(entry["text"], str):
            answers[str(entry["key"])] = StoredAnswer(entry["text"], str(entry["stop"]), entry.get("tokens"))
    return answers


def _append(path: Path, entries: Sequence[Mapping[str, Any]]) -> dict[str, StoredAnswer]:
    """Append a batch in one write; return it as it is read back, which is without secrets."""
    lines = [redaction.redact_json(json.dumps(entry, ensure_ascii=True)) for entry in entries]
    with path.open("a+b") as file:
        file.seek(0, os.SEEK_END)
        begins_line = not file.tell() or _read_last_byte(path) == b"\n"  # else a killed process left half a line
        file.write(("" if begins_line else "\n").encode() + "".join(f"{line}\n" for line in lines).encode())
    run_folder.flush(path)
    return _read_lines(lines)


def _read_last_byte(path: Path) -> bytes:
    """Return the last byte of a file that is not empty."""
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1)
