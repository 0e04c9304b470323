"""`export`: writes a tuned model in the formats of other programs.

Inputs: a run folder and the names of formats. Outputs: a folder with a part for each format and export.json, lines on
the terminal, and the exit code. Not here: how a format is written and proved (`serving.export`).
"""

from __future__ import annotations

import argparse
import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, disk, errors, json_output
from trl_sft.cli import arguments

_FORMATS = ("merged", "gguf", "ollama", "vllm")
_GGUF_TYPES = ("f16", "bf16", "f32", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_EPILOG = """formats:
  merged  a folder that plain transformers loads
  gguf    one file for llama.cpp and what is built on it
  ollama  a Modelfile beside the GGUF file, with a template that renders as the chat template does
  vllm    a folder for `vllm serve`: the adapter where vLLM takes it, else the merged model

Every format is read back and compared with the trained model: prompts, stop tokens, answers, next-token distribution.
The folder appears in one step, after that proof. What cannot be written is refused by name before anything is."""


def main(argv: Sequence[str]) -> int:
    """Export a run; return the exit code."""
    options = _parse(argv)
    if options.to is None:
        return _push(options, options.run)
    formats = _read_formats(options.to)
    target = _find_target(options) if options.push else None  # before hours of writing
    from trl_sft.serving import output_folder, proof
    from trl_sft.serving.export import export_source

    source = export_source.find_source(options.run, options.at)
    output = options.output or options.run.resolve().with_name(f"{source.name}-export")
    output_folder.check(output)
    if options.base == "dequantized" and (source.adapter is None or source.adapter.quantization is None):
        problem, fix = "the base model was not quantized in training", "Leave out `--base dequantized`."
        raise errors.RecipeError(errors.Fault("--base", problem, fix, code="run.bad_option"))
    if "gguf" in formats or "ollama" in formats:
        proof.check_installed()
    console.say("loading   torch and transformers")
    try:
        record = _export(source, formats, options, output=output)
    except KeyboardInterrupt:
        message = "stopped before the end; nothing is left behind\nRun the same command again."
        raise errors.RunStopped(message, errors.EXIT_SIGNAL + signal.SIGINT, code="run.interrupted") from None
    except OSError as error:
        fault = disk.explain(error, [output])
        if fault is None:
            raise
        raise errors.RecipeError(fault) from None
    json_output.add_values(output=str(output), **{key: record[key] for key in _ANSWER})
    console.say(f"wrote     {output}")
    if target is not None:
        _push(options, output, target)
    for line in _list_commands(record, output, source.name):
        console.say(f"Next: {line}")
    return errors.EXIT_DONE


_ANSWER = ("run", "step", "base", "architecture", "merge", "formats", "proof")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command."""
    parser = arguments.create_parser(
        "export RUN --to FORMATS [-o DIR] [--gguf-type TYPE] [--dtype DTYPE] [--at STEP] [--push OWNER/NAME]",
        "Write a tuned model in the formats of other programs, and prove that each is the trained model.",
        example="export runs/first --to gguf,ollama",
        epilog=_EPILOG,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the folder of a run, or of a model")
    parser.add_argument("--to", metavar="FORMATS", help=f"one or more of {', '.join(_FORMATS)}")
    parser.add_argument(
        "-o", "--output", metavar="DIR", type=Path, help="a folder that is new or empty; RUN-export by default"
    )
    parser.add_argument(
        "--gguf-type", choices=_GGUF_TYPES, default="f16", help="of the weights in a GGUF file; f16 by default"
    )
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="of merged weights; that of the model's files by default")
    parser.add_argument("--at", metavar="STEP", type=int, help="export the checkpoint of this step")
    bases = ("original", "dequantized")
    parser.add_argument("--base", choices=bases, default="original", help="of QLoRA: which weights are merged into")
    parser.add_argument("--push", metavar="OWNER/NAME", help="push to the hub; without --to the run as it is")
    parser.add_argument("--private", action="store_true", help="with --push: a new repository is private")
    parser.add_argument("--with-rows", action="store_true", help="with --push: the files with your rows go too")
    options = parser.parse_args(argv)
    if options.to is None and options.push is None:
        parser.error("one of the following arguments is required: --to, --push")
    if options.push is None and (options.private or options.with_rows):
        parser.error(f"{'--private' if options.private else '--with-rows'} needs --push OWNER/NAME")
    if options.with_rows and options.to is not None:
        parser.error("--with-rows pushes the files of a run: leave out --to")
    return options


def _find_target(options: argparse.Namespace) -> Any:
    """Return the repository that `--push` names. Raises UserError if it cannot be written."""
    from trl_sft.publishing import upload

    return upload.find_target("--push", options.push, private=True if options.private else None)


def _push(options: argparse.Namespace, folder: Path, target: Any = None) -> int:
    """Push a folder to the hub, to a repository that was looked at before or now; return the exit code."""
    from trl_sft.publishing import upload

    content = upload.read_content(folder, with_rows=options.with_rows)
    target = target or _find_target(options)
    console.say(f"pushing   {len(content.files) + 1} files to {target.url} ({target.visibility})")
    try:
        pushed = upload.push(content, target)
    except KeyboardInterrupt:
        message = f"the push was stopped; {folder} is whole\nRun the same command again."
        raise errors.RunStopped(message, errors.EXIT_SIGNAL + signal.SIGINT, code="run.interrupted") from None
    json_output.add_values(pushed=pushed.as_json())
    console.say(f"pushed    {pushed.describe()}")
    return errors.EXIT_DONE


def _read_formats(text: str) -> tuple[str, ...]:
    """Return the formats that `--to` names, each once, in the order of writing. Raises RecipeError."""
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = next((name for name in names if name not in _FORMATS), None if names else text)
    if unknown is not None:
        from trl_sft.suggestions import STRICT, nearest_name

        nearest = nearest_name(unknown, _FORMATS, cutoff=STRICT)
        fix = f"Did you mean `{nearest}`?" if nearest else f"Write one or more of {', '.join(_FORMATS)}, as `gguf`."
        fault = errors.Fault("--to", f"`{unknown}` is no format of an export", fix, code="export.unknown_format")
        raise errors.RecipeError(fault)
    return tuple(name for name in _FORMATS if name in names)


def _export(source: Any, formats: tuple[str, ...], options: argparse.Namespace, *, output: Path) -> dict[str, Any]:
    """Plan, write and move the folder to its place; return the content of export.json."""
    import datetime
    import warnings

    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet(), garbage_collection.paused():
        from trl_sft.model.weights import quiet_upstream
        from trl_sft.serving import output_folder
        from trl_sft.serving.export import exporter
        from trl_sft.tokenization import template_date

    with upstream_warnings.quiet(), quiet_upstream(), warnings.catch_warnings(), template_date.restored():
        warnings.simplefilter("ignore")  # peft's on tied weights, which `merge` handles; of libraries on themselves
        if source.model.template_date:
            template_date.pin(datetime.date.fromisoformat(source.model.template_date))
        settings = exporter.ExportSettings(formats, gguf_type=options.gguf_type, dtype=options.dtype, base=options.base)
        export = exporter.Exporter(source, settings)
        export.check_disk(output)
        console.print_lines(_describe_plan(export))
        with output_folder.create(output) as part:
            return export.write(part, _show)


def _describe_plan(export: Any) -> list[tuple[str, str]]:
    """Return the lines about what is exported and how large it will be."""
    source, sizes = export.source, export.count_bytes()
    lines = [("source", source.model.title)]
    if source.adapter is not None:
        lines.append(("base", source.adapter.name))
    parts = [f"{name} {console.format_bytes(size)}" for name, size in sizes.items() if name != "while"]
    lines.append(("writes", ", ".join(parts)))
    if "while" in sizes:
        lines.append(
            ("", f"and {console.format_bytes(sizes['while'])} of merged weights, which are removed at the end")
        )
    return lines


def _show(part: str, entry: dict[str, Any]) -> None:
    """Print the line about a part that is done."""
    seconds = f"{entry['seconds']:.1f} s"
    if part == "proof":
        console.print_lines(entry["lines"])
        console.say(f"proved    every format, in {seconds}")
        return
    if part == "merge":
        delta = entry["delta"]
        text = f"{delta['changed_tensors']:,} of {delta['tensors']:,} tensors changed, "
        text += f"by {delta['relative']:.2g} of the base"
        console.print_lines([("merge", f"{text}, in {seconds}")])
        return
    kind = "" if part == "ollama" else f"{entry['type']}, "
    text = f"{entry['path']}: {kind}{console.format_bytes(entry['bytes'])}, in {seconds}"
    lines = [(part, text)]
    if part == "gguf":
        lines.append(("tokens", _describe_tokens(entry)))
        if entry["context_length"] < entry["positions"]:
            text = (
                f"{entry['context_length']:,} of {entry['positions']:,} positions: llama.cpp has no sliding window here"
            )
            lines.append(("context", text))
    if part == "ollama":
        lines.append(("template", f"{entry['template']['equal_chats']} chats are rendered as by the chat template"))
        lines += [("", note) for note in entry["template"]["notes"]]
    if part == "vllm" and entry["refused_by_vllm"]:
        refused = ", ".join(entry["refused_by_vllm"])
        lines.append(("", f"the merged model, because vLLM does not take the adapter: {refused}"))
    console.print_lines(lines)


def _describe_tokens(entry: dict[str, Any]) -> str:
    """Return the sentence about the comparison of tokens."""
    tokens = entry["tokenizer"]
    rules = f"rules `{tokens['pre_tokenizer']}`" if tokens["pre_tokenizer"] else "SentencePiece"
    prompts = f"{tokens['equal_prompts']} of {tokens['equal_prompts']} prompts"
    text = f"llama.cpp splits {prompts} as the tokenizer does ({rules})"
    for kind in ("plain", "random"):
        if differ := tokens[f"{kind}_texts_that_differ"]:
            text += f"; {differ} of {tokens[f'{kind}_texts']} {kind} texts differ"
    if tokens["only_nfc"]:
        text += "; a text that is not in Unicode's form NFC has other tokens there"
    return text


def _list_commands(record: dict[str, Any], output: Path, name: str) -> list[str]:
    """Return the next commands, one for each format."""
    from trl_sft.serving.export import ollama_export, vllm_export

    commands = []
    for kind, entry in record["formats"].items():
        path = output / entry["path"]
        where = shlex.quote(str(path))
        if kind == "merged":
            commands.append(f"{console.get_python_command()} -m trl_sft chat {where}")
        elif kind == "gguf":
            commands.append(f"llama-server -m {where} --jinja")
        elif kind == "ollama":
            model = ollama_export.name_model(name)
            commands.append(f"ollama create {model} -f {where} && ollama run {model}")
        else:
            commands.append(vllm_export.write_command(entry, path, name=name, base=record["base"]["name"]))
    return commands
