"""Whether the evaluation that a recipe asks for (`evaluate.checks`) can be made, found out before the weights load.

Inputs: a checked recipe and its formatted rows. Outputs: nothing, or every fault that the command `evaluate` would
meet after the training. Not here: the evaluation itself (`cli.evaluate`), and how the key is written
(`recipe.answer_checks`).
"""

from __future__ import annotations

from trl_sft.data.rows import RunRows
from trl_sft.errors import DataError, Fault, Place
from trl_sft.evaluation import before_after, eval_packages, items
from trl_sft.evaluation.checks import check_requests
from trl_sft.recipe import answer_checks
from trl_sft.recipe.checked import Run

_KEY = ("evaluate", "checks")
_WORDS_OF_THE_COMMAND = {  # of instructions -> the words for a recipe
    "or add --check CHECK": "or name a check in `evaluate.checks`",
    "Write `--check CHECK`": "Write the check without a task",
}


def check(run: Run, rows: RunRows) -> None:
    """Refuse checks that cannot score the held-out rows.

    Args:
        run: the checked recipe, which has `evaluate.checks`.
        rows: the formatted rows.

    Raises:
        MissingPackage: the extra `eval` is not installed.
        DataError: a check cannot be used, or no row is held out that has an answer.

    """
    where = run.recipe.where(_KEY)
    eval_packages.require_packages(where, *eval_packages.STATISTICS)
    values = answer_checks.list_values((run.evaluate or {})["checks"])
    drawn = before_after.select_prompts(run, rows, encode=lambda _prompt, _tools: [], ledger={"eval": {}})
    asked = items.read_samples([before_after.describe_prompt(prompt) for prompt in drawn.prompts])
    if not asked:
        problem = "no row is held out that has a prompt and an answer, so there is nothing to compare"
        fix = "Set `data.eval_fraction: 0.05` or `data.eval`, or remove `evaluate.checks`."
        raise DataError(Fault(where, problem, fix, code="evaluation.no_prompts"))
    try:
        requested = check_requests.read_by_task(values, folder=run.recipe.folder(_KEY), where="--check")
        items.choose_checks(asked, requested, may_run_code=False)
    except DataError as error:
        raise DataError([_adapt(fault, where) for fault in error.faults]) from None


def _adapt(fault: Fault, where: Place) -> Fault:
    """Return a fault of the command `evaluate` as one of the recipe."""
    if fault.code == "evaluation.code_not_permitted":
        fix = "Remove it, and run `evaluate RUN --check code --run-code` after the training: only you permit that."
        return fault._replace(where=where, fix=fix)
    fix = fault.fix
    for words, others in _WORDS_OF_THE_COMMAND.items():
        fix = fix.replace(words, others)
    of_a_row = not str(fault.where).startswith("--check")
    problem = f"{fault.where}: {fault.problem}" if of_a_row else fault.problem
    return fault._replace(where=where, problem=problem, fix=fix)
