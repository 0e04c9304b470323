"""`run.mirror`: each checkpoint of a run is copied to a second place, and at the end the finished run.

In: events of the Trainer, the run folder. Out: copies at the mirror, made in the background; lines on the screen. A run
that is stopped waits for the copy of its last checkpoint, since its machine may be gone soon. Not here: the copies
themselves, and fetching them at a new host (`mirroring`).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from trl import SFTConfig

from trl_sft import ranks, run_folder
from trl_sft.errors import LaunchError
from trl_sft.mirroring import access, fetch, ownership, snapshot, uploader
from trl_sft.mirroring.uploader import Uploader
from trl_sft.recipe.checked import Run
from trl_sft.recipe.folder_decision import FolderDecision


class Mirror(TrainerCallback):
    """Copies checkpoints in the background, and the finished run at the end; of several processes the first one."""

    def __init__(self, run: Run, decision: FolderDecision, show: Callable[[str], None]) -> None:
        """Open the mirror, claim it, and find out what of an earlier run the first copy replaces.

        Args:
            run: the checked recipe, with `run.mirror`.
            decision: about the folder; its checkpoint is the one that the run resumes from.
            show: shows a line on the screen.

        Raises:
            LaunchError: the mirror cannot be read or written to.

        """
        self._run, self._show = run, show
        self._uploader: Uploader | None = None
        if not ranks.is_first():
            return
        url, resumed = str(run.options[fetch.KEY[1]]), decision.checkpoint
        try:
            target = access.connect(url)
            names = snapshot.list_snapshots(target)
            ownership.claim(target)
        except Exception as error:
            raise LaunchError(access.explain(error, url, run.recipe.where(fetch.KEY))) from error
        step = -1 if resumed is None else run_folder.get_step(resumed)
        replaced = [name for name in names if name == snapshot.FINISHED or snapshot.get_step(name) > step]
        self._uploader = Uploader(target, run.output_dir, replaced=replaced, show=show)
        self._url = target.url

    def __enter__(self) -> None:
        """Begin; nothing is copied before the first checkpoint."""

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Copy the finished run where the block ends normally; wait for the copies unless the user stops at once."""
        if self._uploader is None:
            return
        if kind is not None and not issubclass(kind, Exception):  # KeyboardInterrupt, Interrupted
            self._show("warning   the copies to the mirror are not waited for")
            uploader.remove_stage(self._run.output_dir)
            return
        self._uploader.retry()
        if kind is None:
            self._uploader.add_finished()
        failed = self._uploader.wait()
        copied = [name for name in self._uploader.copied if name != snapshot.FINISHED]
        newest = max(copied, key=snapshot.get_step, default="")
        names = [*filter(None, [newest]), *(["the finished run"] if snapshot.FINISHED in self._uploader.copied else [])]
        text = f"{' and '.join(names) or 'nothing of this run'} can be fetched from {self._url}"
        missing = "; ".join(
            f"{uploader.describe_copy(name)} is not there: {problem}" for name, problem in sorted(failed.items())
        )
        self._show(f"mirror    {text}" + (f"; {missing}" if failed else ""))

    def on_save(self, args: SFTConfig, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Have the new checkpoint copied, and those that the mirror still lacks."""
        if self._uploader is not None and args.should_save:
            best = Path(state.best_model_checkpoint).name if state.best_model_checkpoint else ""
            self._uploader.add_checkpoints(args.save_total_limit, best)
