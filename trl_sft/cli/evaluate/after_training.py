"""The evaluation that a recipe asks for with `evaluate.checks`, after its training.

Inputs: the recipe of a run that is finished. Outputs: what the command `evaluate` writes, in the run folder. A failure
here loses nothing: the model is saved, and the message has the command that repeats the evaluation. Not here: the
evaluation itself (`evaluation`), and its check before the training (`evaluation.planned_checks` of the package).
"""

from __future__ import annotations

import gc
import shlex
import signal

from trl_sft import console, disk, errors, json_output, run_folder, upstream_warnings
from trl_sft.cli import evaluate as command
from trl_sft.recipe import answer_checks
from trl_sft.recipe.checked import Run


def evaluate(run: Run, failed_push: errors.RunStopped | None = None) -> None:
    """Compare base and tuned model of a run that is finished.

    Args:
        run: the recipe.
        failed_push: why the run is not on the hub, which a failure here must not hide; None = nothing failed.

    Raises:
        RunStopped: the evaluation failed or was stopped.

    """
    options = command.parse([str(run.output_dir)])
    options.check = answer_checks.list_values((run.evaluate or {})["checks"])
    options.allow_missing_tasks = True  # a fault here comes too late: the lines of the screen name them
    options.allow_missing_tasks = True  # of a draw of held-out rows; the screen names them
    options.trust_remote_code = bool(run.model.get("trust_remote_code"))
    console.say("")
    console.say("evaluate  base against tuned model (evaluate.checks)")
    try:
        with upstream_warnings.quiet():
            from trl_sft.cli.evaluate import evaluation

            gc.collect()  # the trained model: the evaluation loads its own from the folder
            found = evaluation.run(run.output_dir, run.output_dir, options)
    except KeyboardInterrupt:
        raise _explain(run, "was stopped", failed_push, exit_code=errors.EXIT_SIGNAL + signal.SIGINT) from None
    except errors.UserError as error:
        problem = "; ".join(f"{fault.where}: {fault.problem}. {fault.fix}" for fault in error.faults)
        raise _explain(run, f"failed: {problem}", failed_push, exit_code=error.exit_code) from None
    except errors.RunStopped as error:
        problem = errors.first_line(error)
        raise _explain(run, f"failed: {problem}", failed_push, exit_code=error.exit_code) from None
    except Exception as error:
        fault = disk.explain(error, [run.output_dir])
        if fault is None:  # of ours: the traceback follows
            console.say_error(str(_explain(run, "failed with an internal error", failed_push, exit_code=1)))
            raise
        problem = f"failed: {fault.problem}. {fault.fix}"
        raise _explain(run, problem, failed_push, exit_code=errors.EXIT_USER_ERROR) from None
    json_output.add_values(**found)


def _explain(run: Run, problem: str, failed_push: errors.RunStopped | None, *, exit_code: int) -> errors.RunStopped:
    """Return the error of an evaluation that failed after the run was finished; `problem` follows "the evaluation"."""
    folder = run_folder.shorten_path(run.output_dir)
    repeat = f"{console.get_python_command()} -m trl_sft evaluate {shlex.quote(folder)}"
    lines = [f"the model is trained and saved in {folder}, but the evaluation {problem}"]
    lines.append(f"To repeat the evaluation: {repeat}")
    lines += [str(failed_push)] if failed_push is not None else []
    return errors.RunStopped("\n".join(lines), exit_code, code="evaluation.failed_after_training")
