"""Finished reruns in a file that only grows, so that an interrupted command continues.

Inputs: a rerun and the losses after it. Outputs: `suspect_reruns.jsonl`, and its losses by key. The key is a digest of
all that decides a rerun: tokens, base model, settings, versions, rows and their order, steps, seed, judging rows. A
line that was half written is left out, and its rerun is trained again. Not here: training (`reruns`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import xxhash

from trl_sft import run_folder
from trl_sft.recipe.upstream import packages
from trl_sft.suspects.plan import Arm
from trl_sft.suspects.short_run import ShortRun

_KEYS = {"key", "losses"}


def digest_run(short: ShortRun, record: Mapping[str, Any]) -> str:
    """Return a digest of what all reruns of a run share; `record`: its run.json."""
    run = short.run
    sections = [run.model, run.lora, run.quantization, run.train, run.options.get("logits_gib"), short.steps]
    judges = [row.number for row in short.judging.rows]
    base = [short.inputs.model.title, record.get("inference", {}).get("base_digest")]
    parts = [sections, base, short.tokens["train"], short.tokens["eval"], judges, _read_versions()]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts, sort_keys=True, default=str).encode("utf-8", "replace"))


def digest_rerun(of_run: str, arm: Arm) -> str:
    """Return the key of a rerun."""
    parts = [of_run, arm.seed, arm.steps, arm.places.tolist()]
    return xxhash.xxh3_128_hexdigest(json.dumps(parts).encode())


def read(path: Path, judges: int) -> dict[str, list[float]]:
    """Return the losses in a file by key; lines that are damaged, or have another number of losses, are left out."""
    known = {}
    for entry in run_folder.read_json_lines(path):
        if entry.keys() >= _KEYS:
            losses = entry["losses"]
            if isinstance(losses, list) and len(losses) == judges and all(type(loss) is float for loss in losses):
                known[str(entry["key"])] = losses
    return known


def append(path: Path, key: str, arm: Arm, *, losses: list[float]) -> None:
    """Add a finished rerun, and have it written to the disk."""
    left_out = "nothing"
    if arm.group:
        left_out = "the suspects" if arm.leaves_out_suspects else "random rows"
    entry = {"key": key, "group": arm.group, "left_out": left_out, "seed": arm.seed, "steps": arm.steps}
    line = json.dumps(entry | {"rows": len(arm.places), "losses": losses}).encode() + b"\n"
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        is_new_line = file.read(1) in (b"", b"\n")  # else a killed process left half a line
        file.write(line if is_new_line else b"\n" + line)
    run_folder.flush(path)


def _read_versions() -> dict[str, str]:
    """Return the versions of the packages that compute."""
    return {name: str(packages.get_version(name)) for name in ("torch", "transformers", "trl", "peft", "accelerate")}
