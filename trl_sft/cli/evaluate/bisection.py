"""One bisection, top to bottom: prompts, both ends, the search, the rows between two checkpoints, file, screen.

Inputs: a run folder and the options of `bisect`. Outputs: `answers.jsonl`, `bisect.jsonl`, lines on the terminal. Not
here: the arguments (`cli.bisect`), the search itself (`evaluation.bisection`), the order of rows
(`training.row_order`).
"""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl_sft import console, errors, json_output, run_folder
from trl_sft.cli.evaluate import evaluation, prompts
from trl_sft.cli.evaluate.sides import Answerer
from trl_sft.errors import DataError, Fault, RecipeError, UserError
from trl_sft.evaluation import bisection, items
from trl_sft.evaluation.checks import check_requests
from trl_sft.evaluation.checks.answer import CheckedAnswer
from trl_sft.evaluation.items import EvaluationItem
from trl_sft.serving import model_folder, model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.serving.prompts import RenderedPrompt, build_renderer
from trl_sft.tokenization import template_date
from trl_sft.training import row_order
from trl_sft.training.row_order import TrainedRows

_BASE = 0  # the step of the base model
_SHOWN = 10  # rows on the screen; bisect.jsonl has all
_PASS, _FAIL = "pass", "fail"
_ONE_TURN = "Bisection finds one turn of the check; it may turn at other checkpoints too"


class Point(NamedTuple):
    """The mean score at a checkpoint."""

    step: int  # 0 = the base model
    mean: float


class _Search:
    """Lets checkpoints answer the prompts, and remembers their scores."""

    def __init__(
        self,
        answerer: Answerer,
        asked: Sequence[EvaluationItem],
        rendered: Sequence[RenderedPrompt],
        *,
        sources: Mapping[int, ModelFolder],
    ) -> None:
        """Take what answers, and the model folder of each step."""
        self._answerer, self._asked, self._rendered, self._sources = answerer, asked, rendered, sources
        self.points: dict[int, Point] = {}
        self.calls: dict[str, dict[str, Any]] = {}

    def measure(self, step: int) -> float:
        """Return the mean score of the answers at a step. Raises UserError."""
        if step in self.points:
            return self.points[step].mean
        name = f"step_{step}" if step else "base"
        side = evaluation.build_side(
            name, self._answerer, self._rendered, source=self._sources[step], is_base=step == _BASE
        )
        began = time.monotonic()
        answers, counts = self._answerer.answer(side)
        seconds = time.monotonic() - began
        scores = [
            item.checks[0].score(CheckedAnswer(answer["text"], item.reference, None, item.prompt, item.task))
            for item, answer in zip(self._asked, answers, strict=True)
        ]
        self.points[step] = Point(step, sum(scores) / len(scores))
        self.calls[name] = counts._asdict() | {"seconds": round(seconds, 3)}
        text = f"{_name_step(step)}: mean score {self.points[step].mean:.1%}; {counts.generated:,} answers generated "
        console.print_lines([("score", f"{text}in {seconds:.1f} s, {counts.cached:,} from {run_folder.ANSWERS}")])
        return self.points[step].mean


def run(folder: Path, output: Path, options: argparse.Namespace) -> int:
    """Find the turn of a check; return the exit code. Raises UserError."""
    steps = _list_steps(folder, options)
    sources = {step: model_folder.find_model(folder, step) for step in steps}
    latest = sources[steps[-1]]
    sources[_BASE] = latest
    tokenizer = model_loading.load_tokenizer(latest, trusts_code=options.trust_remote_code)
    with template_date.restored():
        if latest.template_date:
            template_date.pin(datetime.date.fromisoformat(latest.template_date))
        renderer = build_renderer(latest, tokenizer)
        asked = _read_items(folder, options)
        own = argparse.Namespace(**vars(options) | {"endpoint": None})
        answerer = evaluation.build_answerer(latest, tokenizer, renderer, asked=asked, output=output, options=own)
        rendered = [evaluation.render(renderer, item) for item in asked]
        check = asked[0].checks[0].check.name
        console.print_lines(
            [("prompts", f"{console.format_rows(len(asked))}, scored by: {check}"), ("steps", _list_names(steps))]
        )
        search = _Search(answerer, asked, rendered, sources=sources)
        points, bound = _find_ends(search, steps, options, has_base=bool(latest.base) and options.first is None)
        turn = bisection.find_turn(
            points, lambda step: (search.measure(step) >= bound) == (search.measure(points[0]) >= bound)
        )
        answerer.release()
    result = _describe(search, turn, check=check, bound=bound, asked=len(asked), to=options.to)
    gap = _explain_gap(folder, turn)
    console.print_lines(_list_lines(result, gap))
    rows = _name_rows(folder, output, turn=turn, result=result)
    result["gap"] = gap
    if rows is not None:
        _show_rows(rows, output)
    console.say(f"note      {_ONE_TURN}: `evaluate --at` shows a curve.")
    json_output.add_values(run=folder, output=output, bisect=result, calls=search.calls)
    return errors.EXIT_DONE


def _list_steps(folder: Path, options: argparse.Namespace) -> list[int]:
    """Return the steps of the checkpoints between both ends, in order. Raises RecipeError where there are none."""
    if not folder.is_dir():
        fix = "Name the folder of a run; `python -m trl_sft runs` lists those below `runs/`."
        raise RecipeError(Fault(str(folder), "there is no such folder", fix, code="chat.no_model"))
    steps = sorted(run_folder.get_step(path) for path in run_folder.list_checkpoints(folder))
    if not steps:
        fix = "Set `train.save_steps` and no `save_total_limit` in the recipe before the next run."
        raise RecipeError(Fault(str(folder), "the run has no checkpoints", fix, code="chat.no_checkpoint"))
    ends = {"--from": options.first, "--until": options.last}
    for name, step in ends.items():
        if step is not None and step not in steps:
            problem = f"there is no checkpoint of step {step:,}; there are those of the steps {_list_names(steps)}"
            nearest = min(steps, key=lambda known: abs(known - step))
            raise RecipeError(Fault(name, problem, f"Write `{name} {nearest}`.", code="chat.no_checkpoint"))
    first, last = options.first or steps[0], options.last or steps[-1]
    if first > last or (options.first is not None and first == last):
        problem = f"step {first:,} is not before step {last:,}"
        raise RecipeError(Fault("--from", problem, "Name an earlier checkpoint.", code="run.bad_option"))
    return [step for step in steps if first <= step <= last]


def _read_items(folder: Path, options: argparse.Namespace) -> list[EvaluationItem]:
    """Return the prompts with the check of the command line, and no other. Raises UserError."""
    requested = check_requests.read_by_task([options.check], folder=Path.cwd(), where="CHECK")
    found = [
        item._replace(checks=()) for item in prompts.read_items(folder, data=options.data, max_rows=options.max_rows)
    ]
    task = next(iter(requested))
    chosen = [item for item in found if not task or item.task == task]
    return items.choose_checks(chosen or found, requested, may_run_code=options.run_code)


def _find_ends(
    search: _Search, steps: Sequence[int], options: argparse.Namespace, *, has_base: bool
) -> tuple[list[int], float]:
    """Return the steps to search, whose ends differ as asked, and the bound. Raises DataError where they do not.

    The earliest checkpoint is the first end; where it is not as it should be, the base model is, without `--from`.
    """
    last = search.measure(steps[-1])
    candidates = [list(steps)] if len(steps) > 1 else []
    if has_base:
        candidates.append([_BASE, *steps])
    for points in candidates:
        first = search.measure(points[0])
        bound = options.bound if options.bound is not None else (first + last) / 2
        passes = first >= bound, last >= bound
        if passes == ((True, False) if options.to == _FAIL else (False, True)) and first != last:
            return points, bound
    raise DataError(_explain_no_turn(search, steps, options))


def _explain_no_turn(search: _Search, steps: Sequence[int], options: argparse.Namespace) -> Fault:
    """Return the fault of a check that does not turn between the ends."""
    means = ", ".join(f"{_name_step(step)} {point.mean:.1%}" for step, point in sorted(search.points.items()))
    bound = f" with the bound {options.bound:g}" if options.bound is not None else ""
    problem = f"the check does not turn to {options.to} between both ends{bound}: {means}"
    rises = search.points[steps[-1]].mean > min(point.mean for point in search.points.values())
    fix = f"Look at a curve (`evaluate RUN --at {','.join(map(str, steps[:5]))}`), and set `--from` or `--bound`."
    if rises and options.to == _FAIL:
        fix = "Add `--to pass` to find where it turns to pass, or set `--from` or `--bound`."
    return Fault("CHECK", problem, fix, code="evaluation.no_turn")


def _describe(
    search: _Search, turn: bisection.Turn, *, check: str, bound: float, asked: int, to: str
) -> dict[str, Any]:
    """Return what the search found, as `--json` has it."""
    points = [
        {"step": step, "mean": point.mean, "passes": point.mean >= bound}
        for step, point in sorted(search.points.items())
    ]
    return {
        "check": check,
        "to": to,
        "bound": bound,
        "prompts": asked,
        "evaluated": points,
        "step_before": turn.before,
        "step_after": turn.after,
    }


def _explain_gap(folder: Path, turn: bisection.Turn) -> str:
    """Return which checkpoints were saved between both and are gone; "" = none."""
    train = prompts.read_recipe(folder).train if (folder / run_folder.RESOLVED).is_file() else {}
    every, limit = train.get("save_steps"), train.get("save_total_limit")
    if limit is None or not isinstance(every, int) or train.get("save_strategy", "steps") != "steps":
        return ""
    gone = [step for step in range(turn.before + 1, turn.after) if step % every == 0]
    if not gone:
        return ""
    text = f"the checkpoints of {console.format_number_of(len(gone), 'step')} between them ({_list_names(gone)}) were "
    return f"{text}removed by save_total_limit: {limit}, so the turn cannot be found nearer"


def _list_lines(result: Mapping[str, Any], gap: str) -> list[tuple[str, str]]:
    """Return the lines about the turn."""
    means = {point["step"]: point["mean"] for point in result["evaluated"]}
    before, after = result["step_before"], result["step_after"]
    words = ("passes", "fails") if result["to"] == _FAIL else ("fails", "passes")
    text = f"{result['check']} {words[0]} at {_name_step(before)} ({means[before]:.1%}) and {words[1]} at "
    text += f"{_name_step(after)} ({means[after]:.1%}); bound {result['bound']:.1%}, "
    text += f"{console.format_number_of(len(means), 'evaluation')}"
    return [("turn", text)] + ([("note", gap)] if gap else [])


def _name_rows(folder: Path, output: Path, *, turn: bisection.Turn, result: dict[str, Any]) -> TrainedRows | None:
    """Write the rows between two checkpoints to bisect.jsonl; None = they cannot be named, and the screen says why."""
    result["rows"], result["rows_problem"], result["order_note"] = None, "", ""
    try:
        if not (folder / run_folder.RESOLVED).is_file():
            fix = "Name the folder of a run."
            problem = f"the folder has no {run_folder.RESOLVED}, so the training rows are not known"
            raise DataError(Fault(str(folder), problem, fix, code="evaluation.unknown_order"))
        trained = row_order.list_rows(prompts.read_recipe(folder), folder, after=turn.before, last=turn.after)
    except UserError as error:
        fault = error.faults[0]
        result["rows_problem"] = fault.problem
        console.print_lines([("rows", f"not named: {fault.problem}. {fault.fix}")])
        return None
    output.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": row.step, "place": row.place, "file": row.file, "line": row.line, "source": row.source, **row.content}
        for row in trained.rows
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    run_folder.write_text(output / run_folder.BISECT, text)
    places = list(dict.fromkeys(row.place for row in trained.rows))
    result["rows"] = {"trained": len(trained.rows), "distinct": len(places), "places": places}
    result["order_note"] = trained.note
    steps = f"steps {turn.before + 1:,} to {turn.after:,}"
    distinct = "" if len(places) == len(trained.rows) else f", {len(places):,} different ones"
    console.print_lines([("rows", f"{console.format_rows(len(trained.rows))} were trained in {steps}{distinct}")])
    if trained.note:
        console.print_lines([("note", trained.note)])
    return trained


def _show_rows(trained: TrainedRows, output: Path) -> None:
    """Show the first rows with their steps, places and texts."""
    shown = trained.rows[:_SHOWN]
    table = [("step", "row", "text"), *((str(row.step), row.place, _read_text(row.content)) for row in shown)]
    for line in ["", *console.format_columns(table), ""]:
        console.say(line)
    more = len(trained.rows) - _SHOWN
    hidden = f", {more:,} more rows there" if more > 0 else ""
    console.say(f"wrote     {run_folder.shorten_path(output.absolute() / run_folder.BISECT)}{hidden}")


def _read_text(content: Mapping[str, Any]) -> str:
    """Return a row in one line: the last message of its prompt, and its answer."""
    parts = [content.get(name) for name in ("prompt", "completion", "text")]
    texts = [part if isinstance(part, str) else str(part[-1].get("content")) for part in parts if part]
    return " -> ".join(" ".join(text.split()) for text in texts)


def _name_step(step: int) -> str:
    """Return the name of a step as the screen has it."""
    return f"step {step:,}" if step else "the base model"


def _list_names(steps: Sequence[int]) -> str:
    return console.format_names([f"{step:,}" for step in steps])
