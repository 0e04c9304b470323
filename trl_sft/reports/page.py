"""The report of one or several runs: one HTML file without any other, which needs no network and no scripts.

Inputs: run folders. Outputs: the text of the page. Its parts stand beside this file: the template (`page.html.jinja`),
the style sheet, the script, and uPlot (MIT licence), which makes the curves interactive where scripts run. uPlot was
chosen for its size: 50 kB, where Plotly has 4.5 MB, ECharts 1 MB and Chart.js 200 kB. Not here: which curves there are
(`charts`), and how runs are compared (`comparison`).
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from trl_sft import __version__, console, errors, run_folder
from trl_sft.reports import (
    charts,
    chinese,
    comparison,
    evaluation_chapter,
    format_table,
    opinions_chapter,
    row_markup,
    run_files,
    run_table,
    standalone_page,
    suite_chapter,
)
from trl_sft.reports.run_files import RunFiles
from trl_sft.tokenization.row_segments import Segment, SegmentedRow

_HERE = Path(__file__).parent
_MAX_SAMPLES = 30  # answers on a page; the file of the run has all
_MAX_CHARACTERS = 2000  # of one answer or prompt on a page
_COUNTS = ("tokens", "loss_tokens", "truncated")  # of a stored row
_MAX_VALUES = 200  # lines of the table below a chart


def format_page(runs: Sequence[RunFiles]) -> str:
    """Return the report of one run, or of several with what differs.

    Args:
        runs: as `run_files.read_run` returns them; the first one is what the others are compared with.

    """
    names = _name_runs(runs)
    chart_list = charts.make_charts(runs, names, _list_marks(runs[0]) if len(runs) == 1 else ())
    texts = _read_texts()
    context = {
        "texts": texts,
        "title": ", ".join(names),
        "runs": [_describe_run(run, name) for run, name in zip(runs, names, strict=True)],
        "charts": [_describe_chart(chart, texts) for chart in chart_list],
        "chart_data": _as_script([charts.describe(chart) | {"axis": texts["step"]} for chart in chart_list]),
        "table": [run_table.COLUMNS, *(_list_cells(run, name) for run, name in zip(runs, names, strict=True))],
        "differing_keys": comparison.find_differing_keys(runs),
        "differences": comparison.compare_runs(runs, names),
        "style": Markup(_read("page.css") + row_markup.STYLE + _read("uPlot.min.css")),
        "script": Markup(_read("uPlot.iife.min.js") + "\n" + _read("page.js")),
        "legend": Markup(row_markup.LEGEND_IN_BOTH),
        "version": __version__,
        "written": time.strftime("%Y-%m-%d %H:%M"),
    }
    # half of a surrogate pair cannot be written to a file
    return standalone_page.load_template(_HERE).render(context).encode("utf-8", "replace").decode("utf-8")


def write_at_end(folder: Path) -> None:
    """Write the report of a run that is finished, and say where it is; a run without a report is still finished."""
    path = folder / run_folder.REPORT
    try:
        run_folder.write_text(path, format_page([run_files.read_run(folder)]))
    except OSError as error:
        console.say(f"Report: not written: {errors.first_line(error)}. Run `python -m trl_sft report {folder}` later.")
        return
    console.say(f"Report: open {run_folder.shorten_path(path)} in a browser.")


def _describe_run(run: RunFiles, name: str) -> dict[str, Any]:
    """Return what the page shows of one run."""
    verdict, findings = run.run.get("verdict"), _list_mappings(run.run.get("findings"))
    return {
        "name": name,
        "folder": str(run.folder),
        "state": run.state,
        "outcome": run.outcome,
        "outcome_zh": chinese.translate_outcome(run.outcome),
        "verdict": verdict if isinstance(verdict, dict) and "code" in verdict and "text" in verdict else None,
        "stopped_early": _describe_early_stop(run),
        "verdict_zh": chinese.translate_verdict(verdict) if isinstance(verdict, dict) else None,
        "findings": [(finding, chinese.translate_finding(finding)) for finding in findings],
        "phases": _list_phases(run),
        "damaged": run.damaged,
        "ledger": _describe_ledger(run.ledger),
        "rows": [Markup(row_markup.format_row(row)) for row in _read_rows(run.rows)],
        "metrics": _list_metrics(run.evaluation),
        "prompts": run.evaluation.get("prompts"),
        "evaluation": evaluation_chapter.describe(run.evaluation.get("evaluation")),
        "judge": opinions_chapter.describe_judge(_get_mapping(run.evaluation, "evaluation").get("judge")),
        "votes": opinions_chapter.describe_votes(_get_mapping(run.evaluation, "evaluation").get("votes")),
        "suite": suite_chapter.describe(_get_mapping(run.evaluation, "evaluation").get("suite")),
        "format": format_table.make_rows(run.samples),
        "samples": [_shorten_sample(sample) for sample in _list_samples(run.samples)],
        "num_samples": len(run.samples),
        "answers_by_step": _list_answers_by_step(run.samples),
        "recipe": run.recipe,
        "resolved": run.resolved,
        "facts": _list_facts(run),
        "install": _write_install(run.run.get("versions")),
        "command": f"python -m trl_sft {run.folder / run_folder.RESOLVED}",
    }


def _name_runs(runs: Sequence[RunFiles]) -> list[str]:
    """Return a name for each run: that of its folder, or the path where two folders have the same name."""
    names = [run.folder.resolve().name for run in runs]
    return names if len(set(names)) == len(names) else [str(run.folder) for run in runs]


def _list_cells(run: RunFiles, name: str) -> tuple[str, ...]:
    cells = run_table.format_cells(run_table.describe(run), parent=run.folder)
    return (name, *cells[1:])


def _list_marks(run: RunFiles) -> list[charts.Mark]:
    """Return the steps to name in the chart of the loss: findings, and the step whose weights were saved."""
    marks: list[charts.Mark] = []
    for finding in _list_mappings(run.run.get("findings")):
        steps, code = finding.get("steps"), str(finding.get("code", "")).replace("_", " ")
        if isinstance(steps, list) and steps and isinstance(steps[0], int):
            chinese_finding = chinese.translate_finding(finding) or {}
            marks += [charts.Mark(steps[0], code, chinese_finding.get("name", ""))]
    best = run.run.get("best")
    if isinstance(best, dict) and isinstance(best.get("step"), int):
        marks.append(charts.Mark(best["step"], *_read_texts()["saved_weights"]))
    return marks


def _list_phases(run: RunFiles) -> list[dict[str, str]]:
    """Return the phases of the train loss: the key of the label, first and last step, and the loss at its end."""
    numbers = ("first_step", "last_step", "loss")
    phases = [
        phase for phase in _list_mappings(run.run.get("phases")) if all(_is_number(phase.get(n)) for n in numbers)
    ]
    return [
        {"label": f"phase_{str(phase.get('name')).replace(' ', '_')}"}
        | {name: _format_number(phase[name]) for name in numbers}
        for phase in phases
    ]


def _describe_early_stop(run: RunFiles) -> dict[str, Any] | None:
    """Return where and why a run stopped early; None = it did not, or its record has another form."""
    stop = run.run.get("stopped_early")
    names = ("step", "planned_steps", "evaluations", "best_step", "best_value", "threshold")
    if not isinstance(stop, dict) or not all(_is_number(stop.get(name)) for name in names):
        return None
    return {name: _format_number(stop[name]) for name in names} | {"metric": str(stop.get("metric", ""))}


def _describe_chart(chart: charts.Chart, texts: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return a chart as the template shows it: SVG, and its values as a table."""
    described = charts.describe(chart)
    rows = list(zip(*described["data"], strict=True))
    every = max(1, -(-len(rows) // _MAX_VALUES))
    return {
        "name": chart.name,
        "svg": Markup(charts.format_svg(chart, " / ".join(texts[f"chart_{chart.name}"]))),
        "names": described["names"],
        "marks": described["marks"],
        "rows": [[_format_number(value) for value in row] for row in rows[::every]],
        "omitted": sum(curve.omitted for curve in chart.series),
    }


def _describe_ledger(ledger: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the counts of rows and tokens; None if the run has no ledger yet."""
    train = ledger.get("train")
    if not isinstance(train, dict):
        return None
    lines = [("all_training_rows", "", train)]
    lines += [("source", str(part.get("name", "")), part) for part in _list_mappings(train.get("sources"))]
    for kind, key, parts in (("task", "tasks", train), ("evaluation_set", "eval", ledger)):
        inner = parts.get(key)
        lines += [(kind, str(name), part) for name, part in inner.items()] if isinstance(inner, dict) else []
    lengths = train.get("tokens_per_row")
    reasons = _get_mapping(train, "rows", "rejected")
    return {
        "lines": [(kind, name, _list_counts(part)) for kind, name, part in lines if isinstance(part, dict)],
        "reasons": [(*_name_reason(str(reason)), _format_number(reasons[reason])) for reason in sorted(reasons)],
        "lengths": Markup(_draw_lengths(lengths)) if isinstance(lengths, dict) else None,
        "padding": {
            name: f"{share:.1%}" for name, share in _get_mapping(train, "padding").items() if _is_number(share)
        },
    }


def _name_reason(reason: str) -> tuple[str, str]:
    """Return why rows are left out, in English and in Chinese; "" where there is no Chinese text."""
    return reason, chinese.translate_reason(reason) or ""


def _list_counts(part: Mapping[str, Any]) -> list[str]:
    """Return the counts of a part of the ledger: rows read, kept, truncated and left out, tokens, tokens with loss."""
    rows, tokens = _get_mapping(part, "rows"), _get_mapping(part, "tokens")
    rejected = [count for count in _get_mapping(rows, "rejected").values() if _is_number(count)]
    counts = [rows.get("input"), rows.get("kept"), rows.get("truncated")]
    counts += [sum(rejected) if "rejected" in rows else None, tokens.get("kept"), tokens.get("loss")]
    return [_format_number(count) for count in counts]


def _draw_lengths(lengths: Mapping[str, Any]) -> str:
    """Return the lengths of rows as SVG: a line from shortest to longest, a box from median to 99%."""
    names = ("min", "median", "p90", "p99", "max")
    if not all(_is_number(lengths.get(name)) for name in names):
        return ""
    low, median, p90, p99, high = (float(lengths[name]) for name in names)
    scale = 640 / max(high, 1)
    title = ", ".join(f"{name} {lengths[name]:,}" for name in names)
    out = [f'<svg viewBox="0 0 720 64" role="img" class="chart"><title>{title}</title>']
    out.append(f'<line class="grid" x1="{40 + low * scale:.1f}" x2="{40 + high * scale:.1f}" y1="24" y2="24"/>')
    for first, last, style in ((median, p90, "curve-0"), (p90, p99, "curve-1")):
        width = max((last - first) * scale, 1)
        out.append(f'<rect class="{style}" x="{40 + first * scale:.1f}" y="14" width="{width:.1f}" height="20"/>')
    for name, value in zip(names, (low, median, p90, p99, high), strict=True):
        out.append(f'<line class="tick" x1="{40 + value * scale:.1f}" x2="{40 + value * scale:.1f}" y1="8" y2="40"/>')
        if name in ("min", "median", "max"):
            out.append(f'<text x="{40 + value * scale:.1f}" y="56" text-anchor="middle">{name} {value:,.0f}</text>')
    return "".join([*out, "</svg>"])


def _read_rows(rows: Sequence[Mapping[str, Any]]) -> list[SegmentedRow]:
    """Return stored rows; lines of another form are left out."""
    read = []
    for row in rows:
        try:
            segments = [Segment(str(text), bool(loss), bool(special)) for text, loss, special in row["segments"]]
            tokens, loss_tokens, truncated = (
                int(row[f"num_{name}"]) for name in ("tokens", "loss_tokens", "truncated")
            )
            is_beginning = bool(row.get("is_beginning"))
            read.append(SegmentedRow(str(row["name"]), segments, tokens, loss_tokens, truncated, is_beginning))
        except (KeyError, TypeError, ValueError):
            continue
    return read


def _list_metrics(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return metrics before and after training: task ("" = all), metric, and both values."""
    parts = [("", evaluation), *_get_mapping(evaluation, "tasks").items()]
    rows = []
    for task, part in parts:
        before, after = _get_mapping(part, "before"), _get_mapping(part, "after")
        for name in dict.fromkeys([*before, *after]):
            values = [_format_number(side.get(name)) for side in (before, after)]
            if values != ["-", "-"]:
                rows.append((str(task), str(name).replace("_", " "), *values))
    return rows + _list_losses(evaluation)


def _list_losses(evaluation: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the loss of each source, task or evaluation set before and after training."""
    before, after = (_get_mapping(evaluation, side, "losses") for side in ("before", "after"))
    return [
        (str(name), "loss", _format_number(before.get(name)), _format_number(after.get(name)))
        for name in dict.fromkeys([*before, *after])
    ]


def _list_samples(samples: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the samples that a page shows: those of `evaluate.prompts` first, then held-out ones."""
    return sorted(samples, key=lambda sample: sample.get("number") is None)[:_MAX_SAMPLES]


def _shorten_sample(sample: Mapping[str, Any]) -> dict[str, str]:
    """Return a prompt with its answers as texts of a page."""
    prompt = sample.get("prompt")
    turns = _list_mappings(prompt) if isinstance(prompt, list) else []
    text = "\n".join(f"{turn.get('role')}: {turn.get('content')}" for turn in turns) if turns else str(prompt)
    texts = {"prompt": text, **{name: str(sample.get(name) or "") for name in ("reference", "before", "after")}}
    return {name: _shorten(text) for name, text in texts.items()}


def _list_answers_by_step(samples: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the prompts that were answered during training, each with its answers by step, base and tuned included."""
    listed = []
    for sample in samples:
        steps = sample.get("steps")
        if not isinstance(steps, dict) or not all(str(step).isdecimal() for step in steps):
            continue
        texts = _shorten_sample(sample)
        answers = [(str(step), _shorten(steps[step])) for step in sorted(steps, key=int)]
        listed.append((texts["prompt"], [("before", texts["before"]), *answers, ("after", texts["after"])]))
    return listed


def _shorten(text: Any) -> str:
    """Return a text as a page shows it: escaped for a terminal, and not too long."""
    return console.escape_control_characters(_cut(str(text)))


def _cut(text: str) -> str:
    """Return a text that is not too long for a page, with how much is cut."""
    rest = len(text) - _MAX_CHARACTERS
    return text if rest <= 0 else f"{text[:_MAX_CHARACTERS]} ... ({rest:,} more characters)"


def _list_facts(run: RunFiles) -> list[tuple[str, str]]:
    """Return time, throughput and machine, with the key of each label or a name of run.json."""
    facts = []
    if (seconds := run.get_number("seconds")) is not None:
        facts.append(("duration", console.format_duration(seconds)))
    if (steps := run.get_number("steps")) is not None:
        facts.append(("steps", f"{steps:,.0f}"))
    for name, value in _get_mapping(run.run, "throughput").items():
        facts.append((str(name), _format_number(value)))
    hardware = _get_mapping(run.run, "hardware")
    described = ", ".join(f"{name} {value}" for name, value in hardware.items() if value not in ([], None, ""))
    return [*facts, ("hardware", described)] if described else facts


def _write_install(versions: Any) -> str:
    """Return the line that installs the versions of a run; "" if they are not recorded."""
    if not isinstance(versions, dict):
        return ""
    pins = [f"{name}=={str(version).partition('+')[0]}" for name, version in versions.items()]
    return f"pip install {' '.join(pins)}"


def _as_script(value: Any) -> Markup:
    """Return a value as JSON inside a script element: nothing in it can end the element."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@functools.cache
def _read_texts() -> dict[str, list[str]]:
    """Return the labels of the page in English and Chinese."""
    texts: dict[str, list[str]] = yaml.safe_load(_read("texts.yaml"))
    return texts


@functools.cache
def _read(name: str) -> str:
    return (_HERE / name).read_text(encoding="utf-8")


def _get_mapping(value: Any, *path: str) -> dict[str, Any]:
    """Return a mapping inside a mapping; empty if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _list_mappings(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _format_number(value: Any) -> str:
    """Return a number for a reader; "-" for what is none."""
    if not _is_number(value):
        return "-" if value is None or isinstance(value, dict | list) else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"
