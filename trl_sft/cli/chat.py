"""`chat`: talk to a tuned model in the terminal, or ask it one prompt.

Inputs: the folder of a run, an adapter or a model. Outputs: answers on the terminal or as JSON, and the exit code. Not
here: rendering and generation (`serving.prompts`, `serving.answers`), and the commands of a chat (`serving.session`).
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments, option_numbers

if TYPE_CHECKING:
    from trl_sft.serving.answers import ChatModel
    from trl_sft.serving.model_folder import ModelFolder

_EPILOG = """\
in the chat: /system TEXT, /reset, /save FILE, /help, /exit; Ctrl-C stops an answer, Ctrl-D ends the program.
Answers are greedy unless `evaluate.generation` of the run or --temperature says otherwise."""


def main(argv: Sequence[str]) -> int:
    """Talk to a model; return the exit code."""
    options = _parse(argv)
    from trl_sft.serving import model_folder

    if json_output.is_requested() and options.prompt is None:
        fix = "Add --prompt TEXT, or --prompt - to read it from standard input."
        problem = "a program asks one prompt, and there is none"
        raise errors.RecipeError(errors.Fault("--json", problem, fix, code="run.bad_option"))
    source = model_folder.find_model(options.run, options.at)
    if options.against or source.is_adapter:
        model_folder.check_base(source)
    prompt = _read_prompt(options.prompt)
    console.say_error(f"loading   {source.title}")
    from trl_sft import upstream_warnings

    with upstream_warnings.quiet():
        try:
            return _talk(source, options, prompt)
        except KeyboardInterrupt:
            code = errors.EXIT_SIGNAL + signal.SIGINT
            raise errors.RunStopped("stopped by Ctrl-C", code, code="run.interrupted") from None


def _talk(source: ModelFolder, options: argparse.Namespace, prompt: str | None) -> int:
    """Load the model, and answer one prompt or talk; return the exit code. Raises UserError."""
    from trl_sft import garbage_collection

    with garbage_collection.paused():
        from trl_sft.serving import answers, session
        from trl_sft.tokenization import template_date

    with template_date.restored():
        if source.template_date:
            template_date.pin(datetime.date.fromisoformat(source.template_date))
        chat = answers.open_model(
            source,
            compares_base=bool(options.against),
            options=_choose_generation(options),
            seed=options.seed,
            trusts_code=options.trust_remote_code,
        )
        if prompt is not None:
            return _answer_once(chat, prompt, compares_base=bool(options.against))
        _print_head(chat)
        session.Session(chat, bool(options.against)).run(session.read_line)
    return errors.EXIT_DONE


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = arguments.create_parser(
        "chat RUN [--against base] [--at STEP] [--prompt TEXT]",
        "Talk to a tuned model, with prompts as in training and answers that stop on the same tokens. RUN is the "
        "folder of a run, of an adapter, or of a model.",
        example='chat runs/mine --against base --prompt "What is two plus two?"',
        epilog=_EPILOG,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, an adapter or a model")
    parser.add_argument("--against", choices=["base"], help="show the base model's answer too")
    parser.add_argument("--at", metavar="STEP", type=int, help="the checkpoint of this step")
    parser.add_argument("--prompt", metavar="TEXT", help="answer this prompt and end; - reads it from standard input")
    parser.add_argument("--max-new-tokens", metavar="N", type=int, help="the most tokens of an answer; 512 by default")
    parser.add_argument("--temperature", metavar="T", type=float, help="sample with this temperature; 0 is greedy")
    parser.add_argument("--seed", metavar="N", type=int, help="of sampled answers; that of the run by default")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="let Python code run that the model brings with it"
    )
    options = parser.parse_args(argv)
    numbers = {"--max-new-tokens": (options.max_new_tokens, 1), "--temperature": (options.temperature, 0)}
    numbers |= {"--seed": (options.seed, 0), "--at": (options.at, 1)}
    if faults := option_numbers.list_faults(numbers):
        raise errors.RecipeError(faults)
    return options


def _read_prompt(prompt: str | None) -> str | None:
    """Return the prompt; `-` reads standard input. Raises DataError."""
    if prompt == "-":
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
        except UnicodeDecodeError as error:
            problem = f"standard input is not UTF-8: byte {error.start}"
            fix = "Send the prompt as UTF-8."
            raise errors.DataError(errors.Fault("--prompt", problem, fix, code="data.wrong_encoding")) from None
    return prompt


def _choose_generation(options: argparse.Namespace) -> dict[str, Any]:
    """Return the keys of GenerationConfig that the options set."""
    chosen: dict[str, Any] = {}
    if options.max_new_tokens is not None:
        chosen["max_new_tokens"] = options.max_new_tokens
    if options.temperature is not None:
        sampled = options.temperature > 0
        chosen |= {"do_sample": True, "temperature": options.temperature} if sampled else {"do_sample": False}
    return chosen


def _print_head(chat: ChatModel) -> None:
    """Print which model answers and how prompts are rendered."""
    from trl_sft.serving import model_loading

    size = console.format_bytes(model_loading.count_bytes(chat.model))
    lines = [("model", f"{chat.source.title}, {size} of weights")]
    if chat.base is not None:
        lines.append(
            ("base", f"{console.format_bytes(model_loading.count_bytes(chat.base))} of weights more in memory")
        )
    elif chat.source.is_adapter:
        lines.append(("base", f"{chat.source.base}, the same weights without the adapter"))
    console.print_lines([*lines, ("prompts", chat.renderer.describe())])


def _answer_once(chat: ChatModel, text: str, *, compares_base: bool) -> int:
    """Answer one prompt; return the exit code."""
    from trl_sft.serving import session

    talk = session.Session(chat, compares_base)
    if not json_output.is_requested() and compares_base:
        talk.ask(text)
        return errors.EXIT_DONE
    from trl_sft.serving import answers

    prompt = chat.renderer.render(text)
    sides = [answers.TUNED, answers.BASE] if compares_base else [answers.TUNED]
    shows = None if json_output.is_requested() else console.say_part
    described = {}
    for side in sides:
        answer = chat.answer(prompt, side=side, show=shows)
        described[side] = session.describe_answer(answer)
        if answer.stop_reason == answers.INTERRUPTED:
            raise errors.Interrupted
    console.say()
    tuned = described[answers.TUNED]
    json_output.add_values(prompt_tokens=len(prompt.ids), **tuned, base=described.get(answers.BASE))
    return errors.EXIT_DONE
