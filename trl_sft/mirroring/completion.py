"""The end of a run with `run.mirror`: what was written after the training reaches the mirror too.

Inputs: the run folder of a finished run, with its report, and what `evaluate.checks` and a push to the hub wrote.
Outputs: `finished/` at the mirror has the same bytes; an error where it has not, since a machine may be given back when
the command ends well. Not here: copies during the training (`uploader`).
"""

from __future__ import annotations

from trl_sft import console, errors, run_folder
from trl_sft.mirroring import access, snapshot, storage
from trl_sft.mirroring.fetch import KEY
from trl_sft.recipe.checked import Run


def finish(run: Run, earlier: errors.RunStopped | None = None) -> None:
    """Copy the files of a finished run that the mirror lacks, or has in an older version.

    Args:
        run: The checked recipe, with `run.mirror`.
        earlier: Why something else failed after the training, which a failure here must not hide; None = nothing did.

    Raises:
        RunStopped: They could not be copied.

    """
    folder = run_folder.shorten_path(run.output_dir)
    target = access.connect(str(run.options[KEY[1]]))
    try:
        copied = snapshot.update_snapshot(target, snapshot.FINISHED, snapshot.collect_finished(run.output_dir))
    except Exception as error:  # of any storage library
        problem = f"not at the mirror {target.url}: {storage.describe(error)}"
        lines = [
            f"the model is trained and saved in {folder}, but {problem}",
            f"Copy {folder} to another place before this machine is given back.",
            *([str(earlier)] if earlier is not None else []),
        ]
        exit_code = errors.EXIT_USER_ERROR if earlier is None else earlier.exit_code
        raise errors.RunStopped("\n".join(lines), exit_code, code="mirror.failed") from error
    if copied:
        console.say(f"mirror    {', '.join(copied)} of the finished run: copied to {target.url}, verified")
