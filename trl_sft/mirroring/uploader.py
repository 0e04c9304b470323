"""Uploads in the background: what the run folder holds is copied to the mirror, the newest checkpoint first.

Inputs: the run folder, after each checkpoint and at the end. Outputs: copies at the mirror, lines on the screen. A copy
that fails ends no run: it is named, and tried again after the next checkpoint. Files are copied from second names, so
that the Trainer may remove a checkpoint meanwhile. Not here: what a copy consists of (`snapshot`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from trl_sft import checkpoints, row_progress, run_folder
from trl_sft.console import format_bytes, format_duration
from trl_sft.mirroring import snapshot, storage
from trl_sft.mirroring.storage import Storage

_MIB = 2**20
_LOOK = 0.1  # seconds between two looks at the thread


class Uploader:
    """The thread that copies checkpoints, one after another."""

    def __init__(self, target: Storage, folder: Path, *, replaced: list[str], show: Callable[[str], None]) -> None:
        """Begin with nothing to copy.

        Args:
            target: The mirror.
            folder: The run folder.
            replaced: Copies of an earlier run, which the first copy of this one replaces.
            show: Shows a line on the screen.

        """
        self._target, self._folder, self._replaced, self._show = target, folder, replaced, show
        self._stage = folder / run_folder.MIRROR_STAGE
        self.copied = {name for name in snapshot.list_snapshots(target) if name not in replaced}
        self._waiting: dict[str, Mapping[str, Path]] = {}  # name -> the files of the copy
        self._failed: dict[str, str] = {}  # name -> the problem, until it is copied
        self._lock, self._is_working = threading.Lock(), False
        self._current = ""  # the copy that is being made
        self._due = self._sent = 0  # bytes, since the thread began
        self._limit: int | None = None
        self._best = ""

    def add_checkpoints(self, limit: int | None, best: str) -> None:
        """Have the whole checkpoints of the run folder copied that the mirror lacks.

        Args:
            limit: `save_total_limit`, which the mirror keeps too.
            best: The name of the checkpoint with the best metric; "" = none.

        """
        paths = [path for path in run_folder.list_checkpoints(self._folder) if (path / checkpoints.RECORD).is_file()]
        staged = {}
        with self._lock:
            self._limit, self._best = limit, best
            there = {*self.copied, *self._waiting, self._current}
            missing = [path for path in paths if path.name not in there]
            kept = {path.name for path in paths}
            for name in [name for name in self._waiting if name not in kept]:  # a newer one takes its place
                del self._waiting[name]
        for path in missing:
            try:
                staged[path.name] = _link_files(
                    snapshot.collect_checkpoint(self._folder, path), self._stage / path.name
                )
            except OSError as error:
                self._note_failure(path.name, error)
        self._start(staged)

    def add_finished(self) -> None:
        """Have the finished run copied: the model and its records."""
        self._start({snapshot.FINISHED: snapshot.collect_finished(self._folder)})

    def retry(self) -> None:
        """Have the copies made again that failed."""
        if self._failed:
            self.add_checkpoints(self._limit, self._best)

    def wait(self) -> dict[str, str]:
        """Wait until every copy is made or has failed, and show how far they are.

        Returns:
            For each copy that failed the problem.

        """
        total = max(self._due // _MIB, 1)
        with row_progress.RowProgress("Mirroring", total, unit="MiB") as progress:
            while self._is_busy():
                time.sleep(_LOOK)
                progress.update(max(min(self._sent // _MIB, total) - progress.done, 0))
        remove_stage(self._folder)
        return dict(self._failed)

    def _is_busy(self) -> bool:
        with self._lock:
            return self._is_working

    def _start(self, copies: Mapping[str, Mapping[str, Path]]) -> None:
        """Let the thread make copies; it ends when nothing waits."""
        with self._lock:
            self._waiting |= copies
            size = sum(path.stat().st_size for copy in copies.values() for path in copy.values())
            self._due = self._due + size if self._is_working else size
            if self._is_working or not self._waiting:
                return
            self._is_working, self._sent = True, 0
        threading.Thread(target=self._work, name="mirror", daemon=True).start()

    def _work(self) -> None:
        """Make the copies that wait, the newest checkpoint first."""
        while True:
            with self._lock:
                self._current = ""
                if not self._waiting:
                    self._is_working = False
                    return
                checkpoints_only = [name for name in self._waiting if name != snapshot.FINISHED]
                name = max(checkpoints_only, key=snapshot.get_step, default=snapshot.FINISHED)
                files, self._current = self._waiting.pop(name), name
            try:
                self._copy(name, files)
            except Exception as error:  # a mirror must not end the run
                self._note_failure(name, error)
            finally:
                shutil.rmtree(self._stage / name, ignore_errors=True)

    def _copy(self, name: str, files: Mapping[str, Path]) -> None:
        """Make one copy, and remove the copies that are no longer kept."""
        began, size = time.monotonic(), sum(path.stat().st_size for path in files.values())
        snapshot.write_snapshot(self._target, name, files, count=self._count, replaced=self._replaced)
        with self._lock:
            self._replaced = []
            self._failed.pop(name, None)
            self.copied.add(name)
            kept = [copy for copy in self.copied if copy != snapshot.FINISHED]
            removed = snapshot.choose_removals(kept, self._limit, self._best)
            self.copied.difference_update(removed)
        took = format_duration(time.monotonic() - began)
        self._show(f"mirror    {_name(name)} is at {self._target.url} ({format_bytes(size)} in {took}, verified)")
        for copy in removed:
            snapshot.remove_snapshot(self._target, copy)

    def _count(self, size: int) -> None:
        self._sent += size

    def _note_failure(self, name: str, error: Exception) -> None:
        """Say that a copy failed, and remember it."""
        problem = storage.describe(error)
        with self._lock:
            self._failed[name] = problem
        follows = "" if name == snapshot.FINISHED else "; the run goes on, and the next checkpoint tries again"
        self._show(f"warning   {_name(name)} is not at the mirror: {problem}{follows}")


def _name(copy: str) -> str:
    """Return the name of a copy as a sentence has it."""
    return "the finished run" if copy == snapshot.FINISHED else copy


def remove_stage(folder: Path) -> None:
    """Remove the second names of a run folder's files."""
    shutil.rmtree(folder / run_folder.MIRROR_STAGE, ignore_errors=True)
    with contextlib.suppress(OSError):  # a push to the hub uses the folder too
        (folder / run_folder.PUSH_STAGE).rmdir()


def _link_files(files: Mapping[str, Path], stage: Path) -> dict[str, Path]:
    """Give files second names in a folder, and return them; records of the run, which change, are copied."""
    shutil.rmtree(stage, ignore_errors=True)
    linked = {}
    for name, path in files.items():
        place = stage / name
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            if name.startswith(snapshot.RUN_FILES):
                shutil.copyfile(path, place)
            else:
                os.link(path, place)
        except OSError:  # a file system without second names
            shutil.copyfile(path, place)
        linked[name] = place
    return linked
