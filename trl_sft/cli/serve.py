"""`serve`: a tuned model behind an OpenAI-compatible endpoint.

Inputs: the folder of a run, an adapter or a model. Outputs: a server until a signal ends it, lines on the terminal, and
the exit code. Not here: the endpoint (`serving.server`).
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import json
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sft import console, errors, json_output, run_folder
from trl_sft.cli import arguments
from trl_sft.publishing import next_commands

if TYPE_CHECKING:
    from trl_sft.serving.answers import ChatModel
    from trl_sft.serving.model_folder import ModelFolder

_PACKAGES = ("fastapi", "uvicorn")  # of the extra `serve`
_LONGEST_PROMPT = 200  # characters of the first request
_EPILOG = """\
Answers are those of `chat`: the same prompts, stop tokens, limit and decoding, unless a request says otherwise.
Requests are answered one after the other. Ctrl-C ends the server."""


def main(argv: Sequence[str]) -> int:
    """Serve a model; return the exit code."""
    options = _parse(argv)
    from trl_sft.serving import model_folder, stop_signals
    from trl_sft.serving.server import address

    source = model_folder.find_model(options.run, options.at)
    if source.is_adapter:
        model_folder.check_base(source)
    _check_packages()
    with address.bind(options.host, options.port) as listener:
        if not address.is_loopback(options.host):
            console.say_error(f"note      {options.host} is reached from other machines, and no password is asked for")
        console.say_error(f"loading   {source.title}")
        from trl_sft import upstream_warnings

        with stop_signals.raising(), upstream_warnings.quiet():
            try:
                return _serve(source, options, listener)
            except KeyboardInterrupt as error:
                code = errors.EXIT_SIGNAL + stop_signals.get_number(error)
                raise errors.RunStopped("stopped before the server was ready", code, code="run.interrupted") from None


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command. Raises RecipeError."""
    parser = arguments.create_parser(
        "serve RUN [--host HOST] [--port PORT] [--at STEP]",
        "Serve a tuned model at an OpenAI-compatible endpoint, with prompts as in training and answers that stop on "
        "the same tokens. RUN is the folder of a run, of an adapter, or of a model.",
        example="serve runs/mine --port 8000",
        epilog=_EPILOG,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, an adapter or a model")
    parser.add_argument(
        "--host",
        default=next_commands.DEFAULT_HOST,
        help="the address to listen on; 127.0.0.1 by default: this machine alone",
    )
    parser.add_argument(
        "--port", type=int, default=next_commands.DEFAULT_PORT, help="8000 by default; 0: one that the system chooses"
    )
    parser.add_argument("--at", metavar="STEP", type=int, help="the checkpoint of this step")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let Python code run that the model brings with it"
    )
    options = parser.parse_args(argv)
    for name, value, least, most in (("--port", options.port, 0, 65535), ("--at", options.at, 1, None)):
        if value is not None and not (least <= value and (most is None or value <= most)):
            fix = f"Write a number from {least} to {most}." if most else f"Write a number from {least}."
            raise errors.RecipeError(errors.Fault(name, f"{value} is out of range", fix, code="run.bad_option"))
    return options


def _check_packages() -> None:
    """Raise MissingPackage if the packages of a server are not installed."""
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"a server needs {' and '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed"
        fix = "Run: pip install 'trl-sft[serve]'"
        raise errors.MissingPackage(errors.Fault("serve", problem, fix, code="package.missing"))


def _serve(source: ModelFolder, options: argparse.Namespace, listener: socket.socket) -> int:
    """Load the model, answer a first request and all that follow; return the exit code. Raises UserError."""
    began = time.monotonic()
    from trl_sft import garbage_collection

    with garbage_collection.paused():
        from trl_sft.serving import answers, stop_signals
        from trl_sft.serving.server import address, app, process
        from trl_sft.tokenization import template_date

    with template_date.restored():
        if source.template_date:
            template_date.pin(datetime.date.fromisoformat(source.template_date))
        chat = answers.open_model(
            source, compares_base=False, options={}, seed=None, trusts_code=options.trust_remote_code
        )
        url = address.format_url(options.host, address.get_port(listener))
        load_seconds = time.monotonic() - began
        service = app.AnswerService(chat, next_commands.choose_model_name(source.folder, source.step))
        body = next_commands.build_request(service.name, _choose_prompt(source, chat))
        with process.run(service, listener, options.host) as ended:
            console.print_lines(_describe(chat))
            first = process.ask(url, body)
            values = {"endpoint": f"{url}/v1", "model": service.name, "load_seconds": round(load_seconds, 3)}
            json_output.add_values(**values, first_request=_describe_first(body, first))
            console.print_lines(_describe_ready(values, first))
            console.say(next_commands.format_curl(body, url))
            service.is_announced = True
            try:
                ended.wait()
                raise RuntimeError("the server has ended without a signal")
            except KeyboardInterrupt as error:
                name = signal.Signals(stop_signals.get_number(error)).name
    counts = service.counts
    seconds = round(counts.seconds, 3)
    json_output.add_values(signal=name, requests=counts.requests, tokens=counts.tokens, seconds=seconds)
    answered = f"{counts.requests:,} request{'s' * (counts.requests != 1)} answered, {counts.tokens:,} tokens"
    console.say(f"stopped   by {name}: {answered} in {counts.seconds:.1f} s of generation")
    return errors.EXIT_DONE


def _choose_prompt(source: ModelFolder, chat: ChatModel) -> str:
    """Return a prompt that the model knows: the first short held-out one; "Hello" where none can be had."""
    if not chat.renderer.has_history:
        return next_commands.DEFAULT_PROMPT
    for sample in _iterate_samples(source.folder / run_folder.SAMPLES):
        turns = sample.get("prompt")
        if isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
            text = turns[0].get("content")
            if isinstance(text, str) and text.strip() and len(text) <= _LONGEST_PROMPT and text.isprintable():
                return text
    return next_commands.DEFAULT_PROMPT


def _iterate_samples(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the samples of a run; none where the file is absent or damaged."""
    with contextlib.suppress(OSError, ValueError), path.open(encoding="utf-8") as file:
        for line in file:
            sample = json.loads(line)
            if isinstance(sample, dict):
                yield sample


def _describe(chat: ChatModel) -> list[tuple[str, str]]:
    """Return the lines about what is served."""
    from trl_sft.serving import model_loading

    size = console.format_bytes(model_loading.count_bytes(chat.model))
    decoding = "sampled" if chat.config.do_sample else "greedy"
    lines = [("model", f"{chat.source.title}, {size} of weights")]
    if chat.source.is_adapter:
        lines.append(("base", chat.source.base))
    lines.append(("prompts", chat.renderer.describe()))
    return [
        *lines,
        ("answers", f"{decoding}, at most {chat.config.max_new_tokens:,} tokens where a request sets no limit"),
    ]


def _describe_first(body: dict[str, Any], first: Any) -> dict[str, Any]:
    """Return what the first request measured, for JSON."""
    return {
        "prompt": body["messages"][0]["content"],
        "answer": first.text,
        "prompt_tokens": first.prompt_tokens,
        "tokens": first.tokens,
        "seconds": round(first.seconds, 3),
    }


def _describe_ready(values: dict[str, Any], first: Any) -> list[tuple[str, str]]:
    """Return the lines about a server that has answered its first request."""
    speed = f"{first.tokens / max(first.seconds, 1e-9):,.1f} tokens/s"
    tokens = f"{first.tokens:,} token{'s' * (first.tokens != 1)}"
    return [
        ("loaded", f"in {values['load_seconds']:.1f} s"),
        ("tried", f"a first request: {tokens} in {first.seconds:.2f} s, {speed}"),
        ("ready", f"{values['endpoint']}, model {values['model']}; Ctrl-C ends the server"),
    ]
