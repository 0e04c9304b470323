"""Runs a build: opens the file of calls, finds the models, and writes the set.

Inputs: a checked spec. Outputs: the files of the set, lines on the terminal, and the exit code. Not here: the build
itself (`building.instruction_set`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from trl_sft import errors, run_folder
from trl_sft.building import data_card, instruction_set, output, set_gates, spec_keys
from trl_sft.building.call_budget import BudgetedCaller, CallBudget, read_spending
from trl_sft.building.spec import Spec
from trl_sft.cli.build import screen
from trl_sft.evaluation.call_log import CallLog
from trl_sft.evaluation.endpoint import Endpoint
from trl_sft.evaluation.model_calls import ERRORS, MONEY, CallLimits, ModelCaller
from trl_sft.recipe import paths
from trl_sft.recipe.paths import LocationProblem
from trl_sft.serving import model_loading

_LEAST_ERRORS = 10  # requests in a row without an answer, after which a build stops


def run(spec: Spec) -> int:
    """Build a set; return the exit code.

    Raises:
        UserError: the folder holds something else, a model cannot be reached, or too many calls failed.

    """
    output.check_folder(spec.folder)
    with run_folder.lock(spec.folder) as is_free:
        if not is_free:
            fix = "Wait for it to end, or name another folder in `output.folder`."
            where = run_folder.shorten_path(spec.folder)
            raise errors.RecipeError(
                errors.Fault(where, "another process builds a set in this folder", fix, code="build.folder_in_use")
            )
        with CallLog(spec.folder / output.CALLS) as log:
            return _run(spec, log)


def _run(spec: Spec, log: CallLog) -> int:
    """Build with an open file of calls."""
    limits = {
        spec.get(section, "model"): read_limits(spec, section)
        for section in (spec_keys.GENERATOR, spec_keys.JUDGE)
        if section in spec.sections
    }
    spent_calls, spent_money = read_spending(log.path, limits)
    budget = CallBudget(
        spec.get(spec_keys.BUDGET, "calls"), spec.get(spec_keys.BUDGET, "money"), spent_calls, spent_money
    )
    generator = _make_generator(spec, log, budget)
    judge = None
    if spec_keys.JUDGE in spec.sections:
        judge = _call_endpoint(spec, spec_keys.JUDGE, log, budget=budget)
    student = _load_student(spec)
    count_tokens = None if student is None else lambda text: len(student(text, add_special_tokens=False)["input_ids"])
    gates = set_gates.make_gates(spec, count_tokens=count_tokens)
    built = instruction_set.build(spec, generator, judge, gates=gates, report=screen.report)
    facts: dict[str, Any] = {"generator": describe_model(spec, spec_keys.GENERATOR, generator)}
    if judge is not None:
        facts["judge"] = describe_model(spec, spec_keys.JUDGE, judge)
    facts["calls"] = {"all": budget.spent_calls, "money": round(budget.spent_money, 6), "in_file": len(log.answers)}
    if student is not None:
        facts["student_has_template"] = bool(student.chat_template)
    problems = [*generator.problems, *(judge.problems if judge is not None else [])]
    if problems and not any(built.parts.values()):
        _refuse_empty_set(spec, problems)
    content = output.write_set(spec, built, facts, with_scores=judge is not None)
    screen.print_set(spec, content)
    if fault := _find_failure(spec, content, problems):
        raise errors.LaunchError(fault)
    return errors.EXIT_DONE


def _find_failure(spec: Spec, content: Mapping[str, Any], problems: Sequence[tuple[str, str]]) -> errors.Fault | None:
    """Return why a build is no success: too many failed calls, or a set without a row; None = it is one.

    Args:
        spec: The checked spec.
        content: What build.json says.
        problems: Requests that failed: (name, what went wrong).

    """
    has_rows = bool(content["files"])
    if content["stop"] == ERRORS or (problems and not has_rows):
        return _describe_failed_calls(spec, problems)
    if has_rows:
        return None
    if content["partial"]:
        reason = data_card.explain_stop(content["stop"])
        fix = "Raise it in `budget:`, and run the same command again: it continues."
        if content["stop"] == MONEY:
            fix = f"Lower `max_tokens`, by which a call may cost as much. {fix}"
        return errors.Fault(run_folder.shorten_path(spec.folder), f"no row: {reason}", fix, code="build.no_rows")
    gate = max(content["gates"], key=lambda count: count["rejected"], default={"gate": "none", "rejected": 0})
    text = f"no row passed; the gate `{gate['gate']}` rejected {gate['rejected']:,} of {content['rows']['written']:,}"
    fix = "Read the reasons in rejects.jsonl; then name another model, or change `generator:` or `gates:`."
    where = run_folder.shorten_path(spec.folder / output.REJECTS)
    return errors.Fault(where, text, fix, code="build.no_rows")


def _refuse_empty_set(spec: Spec, problems: Sequence[tuple[str, str]]) -> None:
    """Keep the rows of an earlier build where calls failed and no row came. Raises LaunchError."""
    if run_folder.read_json(spec.folder / output.BUILD).get("files"):
        fault = _describe_failed_calls(spec, problems)
        problem = f"{fault.problem}. The rows of the earlier build stay in {run_folder.shorten_path(spec.folder)}"
        raise errors.LaunchError(fault._replace(problem=problem))


def _describe_failed_calls(spec: Spec, problems: Sequence[tuple[str, str]]) -> errors.Fault:
    """Return the fault of calls that brought no answer."""
    name, problem = problems[-1] if problems else ("a call", "no answer")
    fix = "Start the server or correct the address, and run the same command again: it continues."
    if problem.startswith("429"):
        fix = "Lower `concurrent`, or wait, and run the same command again: it continues."
    text = f"{len(problems):,} calls brought no answer; the last one, {name}: {problem}"
    where = str(spec.get(spec_keys.GENERATOR, "endpoint"))
    return errors.Fault(where, text, fix, code="evaluation.endpoint_failed")


def read_limits(spec: Spec, section: str) -> CallLimits:
    """Return how the model of a section is called."""
    model = spec.sections[section]
    names = ("concurrent", "retries", "first_wait", "seconds", "input_price", "output_price")
    return CallLimits(
        **{name: model[name] for name in names}, errors_in_row=max(_LEAST_ERRORS, 2 * model["concurrent"])
    )


def describe_model(spec: Spec, section: str, caller: Any) -> dict[str, Any]:
    """Return what build.json says of a model and its calls."""
    model = spec.sections[section]
    names = ("model", "endpoint", "temperature", "top_p", "max_tokens", "options")
    return {name: model[name] for name in names} | {"this_process": caller.counts.describe()}


def _call_endpoint(spec: Spec, section: str, log: CallLog, *, budget: CallBudget) -> BudgetedCaller:
    """Return the caller of a model behind a server."""
    endpoint = Endpoint(spec.get(section, "endpoint"), spec.get(section, "model"))
    return BudgetedCaller(ModelCaller(endpoint, log, read_limits(spec, section)), budget)


def _load_student(spec: Spec) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of the student; None = the spec names none. Raises UserError."""
    key = (spec_keys.PLAN, "student")
    name = spec.get(*key)
    if name is None:
        return None
    location = paths.resolve_location(name, Path.cwd())  # as the command `init` reads it
    if isinstance(location, LocationProblem):
        raise errors.RecipeError(
            spec.recipe.fault(key, f"{name}: {location.problem}", location.fix, code=location.code)
        )
    source = str(location.files[0]) if location.files else location.name
    return model_loading.read_tokenizer(source, Path(name))


def _make_generator(spec: Spec, log: CallLog, budget: CallBudget) -> Any:
    """Return the caller of the model that writes: at a server, or on this machine."""
    if spec.get(spec_keys.GENERATOR, "endpoint"):
        return _call_endpoint(spec, spec_keys.GENERATOR, log, budget=budget)
    from trl_sft.cli.build import local_model

    return local_model.load(spec, log, budget)
