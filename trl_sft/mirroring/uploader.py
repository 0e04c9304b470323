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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from trl_sft import checkpoints, row_progress, run_folder
from trl_sft.console import format_bytes, format_duration
from trl_sft.mirroring import access, ownership, snapshot, storage
from trl_sft.mirroring.storage import Storage

_MIB = 2**20
_LOOK = 0.1  # seconds between two looks at the thread
_SILENCE = 3600.0  # seconds without a sent byte, after which the end of a run waits no longer


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
        self._other_writer = ""  # why nothing more is copied; "" = it is

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
            for name in [name for name in self._failed if name not in kept]:  # likewise
                del self._failed[name]
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
        sent, last = self._sent, time.monotonic()
        with row_progress.RowProgress("Mirroring", total, unit="MiB") as progress:
            while self._is_busy():
                time.sleep(_LOOK)
                progress.update(max(min(self._sent // _MIB, total) - progress.done, 0))
                if sent != self._sent:
                    sent, last = self._sent, time.monotonic()
                if time.monotonic() - last > _SILENCE:
                    self._give_up()
                    break
        remove_stage(self._folder)
        return dict(self._failed)

    def _give_up(self) -> None:
        """Count the copies that are not made as failed: the storage takes no byte any more."""
        problem = f"nothing was sent for {format_duration(_SILENCE)}"
        with self._lock:
            self._failed |= dict.fromkeys([*self._waiting, self._current], problem)
            self._waiting.clear()
        self._show(f"warning   the mirror is not waited for any longer: {problem}")

    def _is_busy(self) -> bool:
        with self._lock:
            return self._is_working

    def _start(self, copies: Mapping[str, Mapping[str, Path]]) -> None:
        """Let the thread make copies; it ends when nothing waits."""
        with self._lock:
            if self._other_writer:
                self._failed |= dict.fromkeys(copies, self._other_writer)
                return
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
        """Make one copy, and remove the copies that are no longer kept where no other copy waits."""
        began, size = time.monotonic(), sum(path.stat().st_size for path in files.values())
        self._write(name, files)
        with self._lock:
            self._replaced = []
            self._failed.pop(name, None)
            self.copied.add(name)
        took = format_duration(time.monotonic() - began)
        self._show(
            f"mirror    {describe_copy(name)} is at {self._target.url} ({format_bytes(size)} in {took}, verified)"
        )
        if not self._waiting:  # a machine may be gone before two are copied, so removals come last
            self._remove_older()

    def _write(self, name: str, files: Mapping[str, Path]) -> None:
        """Write a copy; where the storage is full, what this copy replaces makes space, but for the newest one."""
        try:
            snapshot.write_snapshot(self._target, name, files, count=self._count, replaced=self._replaced)
        except Exception as error:
            if not access.is_full(error):
                raise
            snapshot.remove_snapshot(self._target, name)  # a part of it is there
            copies = sorted(self._list_copies(), key=snapshot.get_step)
            later = [*copies, name] if name != snapshot.FINISHED else copies
            replaced = snapshot.choose_removals(later, self._limit, self._best)
            removed = [copy for copy in replaced if copy not in copies[-1:]]
            removed += snapshot.list_incomplete(self._target)
            if not removed:
                raise
            self._remove(removed)
            snapshot.write_snapshot(self._target, name, files, count=self._count, replaced=self._replaced)

    def _remove_older(self) -> None:
        """Remove the copies that `save_total_limit` does not keep, and those that were begun and never finished."""
        try:
            self._remove(snapshot.choose_removals(self._list_copies(), self._limit, self._best))
            with self._lock:
                current = {*self._waiting, *self._failed}
            self._remove([name for name in snapshot.list_incomplete(self._target) if name not in current])
        except Exception as error:
            self._show(f"warning   older copies stay at the mirror: {storage.describe(error)}")

    def _remove(self, names: Sequence[str]) -> None:
        """Remove copies."""
        with self._lock:
            self.copied.difference_update(names)
        for name in names:
            snapshot.remove_snapshot(self._target, name)

    def _list_copies(self) -> list[str]:
        """Return the names of the copies of checkpoints."""
        return [name for name in self.copied if name != snapshot.FINISHED]

    def _count(self, size: int) -> None:
        self._sent += size

    def _note_failure(self, name: str, error: Exception) -> None:
        """Say that a copy failed, and remember it; those that wait are not tried before the next checkpoint."""
        problem = storage.describe(error)
        with self._lock:
            self._failed |= dict.fromkeys([name, *self._waiting], problem)
            self._waiting.clear()
            if isinstance(error, ownership.OtherWriter):
                self._other_writer = problem
        follows = "" if name == snapshot.FINISHED else "; the run goes on, and the next checkpoint tries again"
        if isinstance(error, ownership.OtherWriter):
            follows = "; the run goes on, and copies nothing more"
        self._show(f"warning   {describe_copy(name)} is not at the mirror: {problem}{follows}")


def describe_copy(copy: str) -> str:
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
