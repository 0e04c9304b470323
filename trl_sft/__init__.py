"""trl_sft: a YAML recipe becomes one run of TRL's SFTTrainer.

Inputs: a recipe, as a file. Outputs: a checked run, a preview of its rows, a trained model. Not here: the work itself.
Each function imports the modules that it needs when it is called, so that `import trl_sft` is quick.

Example:
    from trl_sft import load_recipe, train

    result = train(load_recipe("recipe.yaml", ["train.max_steps=10"]))
    result.metrics["eval_loss"]

"""

from __future__ import annotations

import os

from trl_sft import import_path

import_path.exclude_current_folder()  # before any import that a file of the current folder could take the place of

TYPE_CHECKING = False  # in place of `typing`, for the same reason
if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from trl_sft.cli.preview.rows import Preview
    from trl_sft.errors import RunStopped
    from trl_sft.recipe.checked import Run
    from trl_sft.training.finish import Result

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "show", "train"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and check a recipe; no weights are loaded and torch is not imported.

    Args:
        path: The YAML file.
        overrides: Values that replace those of the file, as on the command line: `train.max_steps=10`.

    Returns:
        The checked run, as data.

    Raises:
        trl_sft.errors.RecipeError: The recipe has faults; the error has all of them.

    """
    from trl_sft.recipe import build

    return build.load_run(path, [overrides] if isinstance(overrides, str) else overrides)


def show(run: Run, num_rows: int = 3) -> Preview:
    """Return the first rows of each source as the model sees them; no weights are loaded.

    Args:
        run: What `load_recipe` returned.
        num_rows: Rows of each source.

    Returns:
        A preview, which a notebook shows in colour.

    Raises:
        trl_sft.errors.UserError: A problem that would stop the run before its weights load.

    """
    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.cli.preview import rows

        return rows.build_preview(run, num_rows)


def train(run: Run) -> Result:
    """Train: load the model, tokenize the rows, train, evaluate, save; with `evaluate.checks` compare base and tuned.

    Args:
        run: What `load_recipe` returned.

    Returns:
        The folder of the run, the number of steps, and the metrics of the evaluation set.

    Raises:
        trl_sft.errors.UserError: A problem that the user can fix, before training or in a streamed row.
        trl_sft.errors.RunStopped: Training started and ended early: memory, time limit, signal, loss not finite.

    """
    from trl_sft import earlier_run, errors, garbage_collection, ranks, upstream_warnings
    from trl_sft.recipe import folder_decision

    if ranks.is_first():
        earlier_run.recover(run.output_dir)
        if "mirror" in run.options:
            from trl_sft.mirroring import fetch

            fetch.begin(run)
    decision = folder_decision.check_folder(run)  # before the imports, which take seconds
    # Large tensors on a CPU lie in pages of 2 MB: otherwise a step waits while the kernel clears pages of 4 KB one
    # by one (benchmarks/step.py). torch reads this variable before its first tensor; it has an effect on Linux only.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    failed_push = None
    with upstream_warnings.quiet():
        with garbage_collection.paused():
            from trl_sft.training import run as training_run

        try:
            result = training_run.run(run, decision)
        except errors.RunStopped as error:
            if error.code != "hub.push_failed":  # the run itself is finished
                raise
            failed_push = error
    if ranks.is_first():
        _conclude(run, failed_push)
    if failed_push is not None:
        raise failed_push
    return result


def _conclude(run: Run, failed_push: RunStopped | None) -> None:
    """Write the page of a finished run, run its checks, and send the rest to its mirror. Raises RunStopped."""
    from trl_sft import errors
    from trl_sft.reports import page

    failure = failed_push
    page.write_at_end(run.output_dir)
    try:
        if "checks" in (run.evaluate or {}):
            from trl_sft.cli.evaluate import after_training

            after_training.evaluate(run, failed_push)
    except errors.RunStopped as error:
        failure = error
        raise
    finally:
        if "mirror" in run.options:
            from trl_sft.mirroring import completion

            completion.finish(run, failure)
