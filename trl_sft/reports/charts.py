"""Curves of one or several runs: which logged values become which chart, and each chart as SVG.

Inputs: log entries. Outputs: charts as data, which a script of the page makes interactive, and as SVG, which needs no
script. Not here: the page (`page`), and the interactive charts (uPlot, inlined by `page`).
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from trl_sft.reports.run_files import RunFiles

_WIDTH, _HEIGHT = 720, 260  # of the SVG's own units
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 10, 28  # margins around the plotted area
_MAX_POINTS = 2000  # of one curve; a longer one is thinned
_STYLES = 8  # colours that the style sheet has

_ANSWER_SCORE = "answer_score"  # of the metric that run.json has under `answer_metric`
# Chart -> the logged names that it shows. A name with `/` at its end stands for all that begin with it.
_CHARTS: dict[str, tuple[str, ...]] = {
    "loss": ("loss", "eval_loss"),
    _ANSWER_SCORE: (),
    "loss_by_source": ("loss/", "eval_loss/"),
    "loss_by_task": ("task_loss/", "eval_task_loss/"),
    "token_accuracy": ("mean_token_accuracy", "eval_mean_token_accuracy"),
    "learning_rate": ("learning_rate",),
    "gradient_norm": ("grad_norm",),
    "entropy": ("entropy", "eval_entropy"),
}


class Series(NamedTuple):
    """One curve: a logged value by step."""

    name: str
    steps: list[float]
    values: list[float]  # of the same length as `steps`; all finite
    omitted: int  # entries that are not finite


class Mark(NamedTuple):
    """A place on the step axis that is named."""

    step: float
    text: str
    chinese: str = ""  # the same text; "" = there is none


class Chart(NamedTuple):
    """Curves over the same steps."""

    name: str  # a key of `_CHARTS`
    series: list[Series]
    marks: list[Mark]


def make_charts(runs: Sequence[RunFiles], names: Sequence[str], marks: Sequence[Mark] = ()) -> list[Chart]:
    """Return the charts that the logs have values for; the loss comes first.

    Args:
        runs: one run, or several, whose curves are laid over each other.
        names: what each run is called; shown in the names of curves where there are several runs.
        marks: places to name in the chart of the loss.

    """
    charts = []
    for chart, wanted in _CHARTS.items():
        series = []
        for run, name in zip(runs, names, strict=True):
            for key in _list_keys(run.log, wanted if chart != _ANSWER_SCORE else _list_answer_metric(run)):
                curve = _collect(run.log, key, f"{name}: {key}" if len(runs) > 1 else key)
                if curve.values:
                    series.append(curve)
        if series:
            charts.append(Chart(chart, series, list(marks) if chart == "loss" else []))
    return charts


def describe(chart: Chart) -> dict[str, Any]:
    """Return a chart as the script of the page takes it: all steps, and for each curve its values or null."""
    steps = sorted({step for curve in chart.series for step in curve.steps})
    columns = []
    for curve in chart.series:
        known = dict(zip(curve.steps, curve.values, strict=True))
        columns.append([known.get(step) for step in steps])
    return {
        "names": [curve.name for curve in chart.series],
        "data": [steps, *columns],
        "marks": [mark._asdict() for mark in chart.marks],
    }


def format_svg(chart: Chart, title: str) -> str:
    """Return a chart as SVG with axes, curves, marks and a title that a screen reader reads."""
    steps = [step for curve in chart.series for step in curve.steps]
    values = [value for curve in chart.series for value in curve.values]
    x_ticks, y_ticks = find_ticks(min(steps), max(steps)), find_ticks(min(values), max(values))
    x_range = _widen(min(steps), max(steps))
    y_range = _widen(min(y_ticks[0], *values), max(y_ticks[-1], *values))

    def x(step: float) -> float:
        return _LEFT + (step - x_range[0]) / (x_range[1] - x_range[0]) * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        return _HEIGHT - _BOTTOM - (value - y_range[0]) / (y_range[1] - y_range[0]) * (_HEIGHT - _TOP - _BOTTOM)

    out = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" class="chart"><title>{html.escape(title)}</title>']
    for tick in y_ticks:
        grid = f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        out += [grid, f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>']
    for tick in x_ticks:
        if x_range[0] <= tick <= x_range[1]:
            out.append(f'<text x="{x(tick):.1f}" y="{_HEIGHT - 8}" text-anchor="middle">{tick:,.6g}</text>')
    for mark in chart.marks:
        place = f'x1="{x(mark.step):.1f}" x2="{x(mark.step):.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"'
        both = " / ".join(filter(None, [mark.text, mark.chinese]))  # SVG shows a title without regard to its language
        out.append(f'<line class="mark" {place}><title>{html.escape(both)}</title></line>')
    for number, curve in enumerate(chart.series):
        points = [(x(step), y(value)) for step, value in zip(curve.steps, curve.values, strict=True)]
        style = f"curve-{number % _STYLES}"
        name = f"<title>{html.escape(curve.name)}</title>"
        if len(points) > 1:
            line = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            out.append(f'<polyline class="{style}" points="{line}">{name}</polyline>')
        if len(points) <= 40:  # few points are hard to see on a line alone
            out += [f'<circle class="{style}" cx="{px:.1f}" cy="{py:.1f}" r="3">{name}</circle>' for px, py in points]
    return "".join([*out, "</svg>"])


def find_ticks(low: float, high: float, *, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover the range from `low` to `high`."""
    low, high = _widen(low, high)
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.floor(low / step)
    return [number * step for number in range(first, math.ceil(high / step) + 1)]


def _widen(low: float, high: float) -> tuple[float, float]:
    """Return a range that is not empty."""
    if high - low > max(abs(low), abs(high)) * 1e-12:
        return low, high
    margin = abs(high) * 0.1 or 1.0
    return low - margin, high + margin


def _list_keys(log: Sequence[dict[str, Any]], wanted: Sequence[str]) -> list[str]:
    """Return the logged names that a chart shows, in the order of `wanted`, then by name."""
    logged = {name for entry in log for name in entry}
    keys: list[str] = []
    for name in wanted:
        keys += sorted(key for key in logged if key.startswith(name)) if name.endswith("/") else [name]
    return [key for key in keys if key in logged]


def _list_answer_metric(run: RunFiles) -> list[str]:
    """Return the name of the metric for which a run scored answers at each evaluation; [] = it scored none."""
    entry = run.run.get("answer_metric")
    return [str(entry["metric"])] if isinstance(entry, dict) and "metric" in entry else []


def _collect(log: Sequence[dict[str, Any]], key: str, name: str) -> Series:
    """Return the curve of one logged value; the last entry of a step counts."""
    known: dict[float, float] = {}
    omitted = 0
    for entry in log:
        step, value = entry.get("step"), entry.get(key)
        if not isinstance(step, int | float) or not isinstance(value, int | float):
            continue
        if math.isfinite(value):
            known[float(step)] = float(value)
        else:
            omitted += 1
    steps = sorted(known)
    if len(steps) > _MAX_POINTS:
        every = math.ceil(len(steps) / _MAX_POINTS)
        steps = [*steps[:-1:every], steps[-1]]
    return Series(name, steps, [known[step] for step in steps], omitted)
