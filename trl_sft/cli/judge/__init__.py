"""`judge`: people judge the answers of base and tuned model on a page, or another model judges them.

Inputs: a run folder and options. Outputs: with `-o PAGE` alone an HTML file and its key; with `--model` the verdicts of
a model; and the exit code. Not here: the page (`page`), and the model (`model_judge`).
"""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import errors
from trl_sft.cli import arguments, resumable

_MAX_PAIRS = 100
_EPILOG = """\
people: send the page to raters, and keep the key: it says which model each answer is of. The page needs no network and
  no other file. Each rater votes in a browser, downloads one file and sends it back; `votes` reads them.
a model: it judges the answers of `evaluate RUN`, each pair in both orders, and is audited first. --endpoint URL is a
  server with OpenAI's protocol (a key is read from OPENAI_API_KEY); without it --model is a folder on this machine.
  Every prompt and answer is kept in judging.jsonl: the same command again makes only the calls that are missing."""
_PAGE_OPTIONS = ("--key", "--answers", "--show-reference")
_MODEL_OPTIONS = ("--dimensions", "--rubric", "--language", "--skip-audit", "--trust-remote-code")
_ENDPOINT_OPTIONS = (
    *("--max-calls", "--max-cost", "--input-price", "--output-price", "--concurrent", "--timeout"),
    *("--max-tokens", "--decoding", "--no-schema"),
)
_DEFAULTS = {"concurrent": 8, "timeout": 300.0, "max_tokens": 1024, "language": "auto"}


def main(argv: Sequence[str]) -> int:
    """Write a page for people, or let a model judge; return the exit code."""
    parser = _build_parser()
    options = parser.parse_args(argv)
    is_model = options.model is not None or options.endpoint is not None
    if not is_model and options.output is None:
        parser.error("the following arguments are required: -o PAGE, or --model")
    _check_options(options, is_model=is_model)
    for name, value in _DEFAULTS.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if is_model:
        from trl_sft.cli.judge import model_judge

        with resumable.explain_endings(kept="replies"):
            return model_judge.run(options)
    from trl_sft.cli.judge import page

    options.rows = _MAX_PAIRS if options.rows is None else options.rows
    return page.run(options)


def _build_parser() -> argparse.ArgumentParser:
    """Return the parser of both forms of the command."""
    parser = arguments.create_parser(
        "judge RUN -o PAGE | judge RUN --model NAME [--endpoint URL] [--dimensions NAMES]",
        "Write one HTML page on which people judge the answers of base and tuned model side by side, without knowing "
        "which is which; or let another model judge them, in both orders.",
        example="judge runs/first -o judge.html\n  python -m trl_sft judge runs/first --endpoint "
        "http://127.0.0.1:8000/v1 --model NAME",
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder")
    add(
        "-o",
        "--output",
        metavar="PATH",
        type=Path,
        help="the HTML file; of a model the folder of its files, RUN by default",
    )
    add("--rows", metavar="N", type=int, help=f"the most prompts; {_MAX_PAIRS} on a page, all for a model by default")
    add("--seed", metavar="N", type=int, default=0, help="of order and sides, and of the model; 0 by default")
    people = parser.add_argument_group("a page for people")
    people.add_argument("--key", metavar="FILE", type=Path, help="the key; PAGE.key.json beside the page by default")
    people.add_argument("--show-reference", action="store_true", help="show the expected answer too")
    sources = ("samples", "evaluation")
    people.add_argument(
        "--answers", choices=sources, help="those of training, or those of `evaluate`, which are taken where there are"
    )
    _add_model_options(parser)
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a model that judges."""
    add = parser.add_argument_group("a model judges").add_argument
    add("--model", metavar="NAME", help="the model at --endpoint, or the folder of a model on this machine")
    add("--endpoint", metavar="URL", help="a server with OpenAI's protocol, up to /v1")
    add("--dimensions", metavar="NAMES", help="score each answer from 1 to 5 too: all, or names of the rubric")
    add("--rubric", metavar="FILE", type=Path, help="a rubric of your own (YAML); all its dimensions by default")
    add("--language", choices=("auto", "en", "zh"), help="of the instructions; that of each prompt by default")
    add("--skip-audit", action="store_true", help="judge without the audit; the result is marked")
    add("--max-calls", metavar="N", type=int, help="make at most N calls, also counting those that fail")
    add("--max-cost", metavar="X", type=float, help="spend at most X; needs both prices")
    add("--input-price", metavar="X", type=float, help="of a million tokens of prompts")
    add("--output-price", metavar="X", type=float, help="of a million tokens of replies")
    add("--concurrent", metavar="N", type=int, help=f"calls at once; {_DEFAULTS['concurrent']} by default")
    add("--timeout", metavar="SECONDS", type=float, help=f"of one call; {_DEFAULTS['timeout']:.0f} by default")
    add("--max-tokens", metavar="N", type=int, help=f"of one reply; {_DEFAULTS['max_tokens']} by default")
    add("--decoding", metavar="JSON", help="fields of a call: '{\"max_completion_tokens\": 4000}'; null leaves one out")
    add("--no-schema", action="store_true", help="do not send the JSON Schema of a reply; replies are checked anyway")
    add("--trust-remote-code", action="store_true", help="let Python code run that a judge on this machine brings")


def _check_options(options: argparse.Namespace, *, is_model: bool) -> None:
    """Refuse options of the other form, and numbers out of range; read `--decoding`. Raises UserError."""
    faults = []
    foreign = [*_PAGE_OPTIONS] if is_model else [*_MODEL_OPTIONS, *_ENDPOINT_OPTIONS]
    if is_model and options.endpoint is None:
        foreign += _ENDPOINT_OPTIONS
    for name in foreign:
        if getattr(options, name[2:].replace("-", "_")) not in (None, False):
            needed = "a page for people" if name in _PAGE_OPTIONS else "a model behind --endpoint"
            if name in _MODEL_OPTIONS:
                needed = "--model"
            problem = f"the option belongs to {needed}"
            faults.append(errors.Fault(name, problem, f"Remove {name}.", code="run.bad_option"))
    if is_model and options.model is None:
        problem = "a server and the name of a model there belong together"
        faults.append(errors.Fault("--endpoint", problem, "Add --model NAME.", code="run.bad_option"))
    if options.endpoint is not None and not re.match(r"https?://[^/\s]+", options.endpoint):
        problem = f"{options.endpoint} is no address of a server"
        fix = "Write it with http:// or https://, and up to /v1: http://127.0.0.1:8000/v1."
        faults.append(errors.Fault("--endpoint", problem, fix, code="run.bad_option"))
    faults += _check_numbers(options)
    if faults:
        raise errors.UsageError(faults)
    options.decoding = _read_decoding(options.decoding)


def _check_numbers(options: argparse.Namespace) -> list[errors.Fault]:
    """Return the faults of numbers out of range, and of a budget in money without prices."""
    faults = []
    whole = {"--rows": options.rows, "--max-calls": options.max_calls, "--concurrent": options.concurrent}
    whole["--max-tokens"] = options.max_tokens
    for name, number in whole.items():
        if number is not None and number < 1:
            fix = "Write a number of at least 1."
            faults.append(errors.Fault(name, f"it is {number}", fix, code="run.bad_option"))
    money = {"--max-cost": options.max_cost, "--input-price": options.input_price}
    money |= {"--output-price": options.output_price}
    for name, value in money.items():
        if value is not None and not (math.isfinite(value) and value >= 0):
            fix = "Write a number from 0."
            faults.append(errors.Fault(name, f"{value} is out of range", fix, code="run.bad_option"))
    if options.timeout is not None and not (math.isfinite(options.timeout) and options.timeout > 0):
        fix = "Write a number of seconds above 0."
        faults.append(errors.Fault("--timeout", f"it is {options.timeout}", fix, code="run.bad_option"))
    prices = (options.input_price, options.output_price)
    if (options.max_cost is not None and None in prices) or (prices.count(None) == 1):
        problem = "a cost needs both prices of the model"
        fix = "Add --input-price and --output-price, each of a million tokens."
        faults.append(errors.Fault("--max-cost", problem, fix, code="run.bad_option"))
    return faults


def _read_decoding(text: str | None) -> dict[str, Any]:
    """Return the fields of `--decoding`. Raises UsageError."""
    if text is None:
        return {}
    try:
        fields = json.loads(text)
    except ValueError:
        fields = None
    if not isinstance(fields, dict) or set(fields) & {"messages", "model", "stream", "response_format", "n"}:
        problem = "it is no JSON object of fields that decide how a reply is decoded"
        fix = 'Write for example --decoding \'{"max_completion_tokens": 4000, "temperature": null}\'.'
        raise errors.UsageError(errors.Fault("--decoding", problem, fix, code="run.bad_option"))
    return fields
