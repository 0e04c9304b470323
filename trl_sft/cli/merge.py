"""`merge`: merges the adapter of a run into its base model.

Inputs: a run folder. Outputs: a folder that plain transformers loads, lines on the terminal, and the exit code. Not
here: how an adapter is merged and proved (`serving`).
"""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trl_sft import console, disk, errors, json_output, run_folder
from trl_sft.cli import arguments

_EPILOG = """The folder appears in one step, once the proof has succeeded: the logits of the merged model and of the
adapter on its base model agree. An adapter trained on a quantized base (QLoRA) is merged into the base that is not
quantized, and what that changes is measured; `--base dequantized` merges it into the weights it was trained on."""


def main(argv: Sequence[str]) -> int:
    """Merge the adapter of a run; return the exit code."""
    parser = arguments.create_parser(
        "merge RUN -o DIR [--dtype DTYPE] [--at CHECKPOINT]",
        "Merge the adapter of a run into its base model, and prove that the merged model is the trained one.",
        example="merge runs/first -o runs/first-merged",
        epilog=_EPILOG,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="a run folder")
    parser.add_argument("-o", "--output", metavar="DIR", type=Path, required=True, help="a folder that is new or empty")
    dtypes = ("bfloat16", "float16", "float32")
    parser.add_argument("--dtype", choices=dtypes, help="of the merged weights; that of the base's files by default")
    parser.add_argument("--at", metavar="CHECKPOINT", default="", help="merge a checkpoint: its step, for example 50")
    bases = ("original", "dequantized")
    parser.add_argument("--base", choices=bases, default="original", help="of QLoRA: which weights are merged into")
    options = parser.parse_args(argv)
    from trl_sft.serving import output_folder, trained_adapter

    adapter = trained_adapter.find_adapter(options.run, options.at)
    output_folder.check(options.output)
    if options.base == "dequantized" and adapter.quantization is None:
        problem, fix = "the base model was not quantized in training", "Leave out `--base dequantized`."
        raise errors.RecipeError(errors.Fault("--base", problem, fix, code="run.bad_option"))
    console.say("loading   torch, transformers and peft")
    try:
        record = _merge(adapter, options)
    except KeyboardInterrupt:
        message = "stopped before the end; nothing is left behind\nRun the same command again."
        raise errors.RunStopped(message, errors.EXIT_SIGNAL + signal.SIGINT, code="run.interrupted") from None
    except OSError as error:
        fault = disk.explain(error, [options.output])
        if fault is None:
            raise
        raise errors.RecipeError(fault) from None
    json_output.add_values(output=options.output, **{key: record[key] for key in _ANSWER})
    console.say(f"wrote     {options.output}")
    folder = shlex.quote(str(options.output))
    console.say(f"Next: {console.get_python_command()} -m trl_sft chat {folder}")
    return errors.EXIT_DONE


_LARGE_KL = 0.1  # nats, mean: answers differ visibly; SmolLM2-135M in NF4 has 1.5
_ANSWER = ("run", "adapter", "base", "dtype", "tied_weights_separated", "delta", "quantization", "proof")


def _merge(adapter: Any, options: Any) -> dict[str, Any]:
    """Merge, prove, and move the folder to its place; return the content of merge.json."""
    import warnings

    from trl_sft import garbage_collection, upstream_warnings

    with upstream_warnings.quiet(), garbage_collection.paused():
        from trl_sft.model.weights import quiet_upstream
        from trl_sft.serving import merge, merge_proof, output_folder

    with upstream_warnings.quiet(), quiet_upstream(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's on tied weights, which `merge` handles; of libraries on themselves
        merger = merge.Merger(adapter, dtype=options.dtype, base=options.base)
        merge.check_disk(options.output, merger.count_bytes())
        console.print_lines(_describe(adapter, merger))
        with output_folder.create(options.output) as part:
            merged = merger.write(part)
            console.say(f"merged    {_describe_delta(merged)}")
            proof = merge_proof.prove(merger, part)
            console.print_lines(_describe_proof(proof, merged))
            return merge.write_record(merged, adapter, base=options.base, proof=proof)


def _describe(adapter: Any, merger: Any) -> list[tuple[str, str]]:
    """Return the lines about what is merged."""
    size = console.format_bytes(merger.count_bytes())
    lines = [("adapter", adapter.label), ("base", f"{adapter.name}, {merger.base} weights")]
    if not adapter.is_known_base:
        lines.append(("note", f"{run_folder.RUN} has no digest of the base model, so it was not compared"))
    return [*lines, ("writes", f"{str(merger.dtype).removeprefix('torch.')}, {size}")]


def _describe_delta(merged: Any) -> str:
    """Return the sentence about what the adapter changes."""
    delta = merged.delta.describe()
    text = (
        f"{delta['changed_tensors']:,} of {delta['tensors']:,} tensors changed, by {delta['relative']:.2g} of the base "
    )
    text += f"(largest {delta['max']:.2g}, mean {delta['mean']:.2g})"
    if merged.unties:
        text += "; embedding and head, which the base ties, are written apart"
    return text


def _describe_proof(proof: dict[str, Any], merged: Any) -> list[tuple[str, str]]:
    """Return the lines about the proof, and about what quantization changes."""
    lines = []
    if merged.quantization.tensors:
        share = merged.quantization.describe()["relative"]
        lines.append(
            ("quantized", f"{merged.quantization.tensors:,} weights of training differ by {share:.2g} from the base's")
        )
    if proof["covers"] == "tensors":
        needed, available = (console.format_bytes(proof[f"{word}_bytes"]) for word in ("needed", "available"))
        text = f"tensors only: to compare logits the model needs {needed} of memory, and {available} are free"
        return [*lines, ("proof", text)]
    ours, base = proof["merged_against_tuned"], proof["base_against_tuned"]
    text = f"logits of {proof['rows']} {proof['rows_from']} ({proof['tokens']:,} tokens) differ by "
    text += f"{ours['relative']:.2g} of "
    text += f"their spread (tolerance {proof['tolerance']:g}; the base differs by {base['relative']:.2g}); "
    text += f"KL mean {ours['mean_kl']:.2g}, worst {ours['worst_kl']:.2g}"
    lines.append(("proof", text))
    if trained := proof.get("merged_against_quantized"):
        text = f"against the adapter on the quantized base: KL mean {trained['mean_kl']:.2g}, "
        text += f"worst {trained['worst_kl']:.2g}"
        lines.append(("", f"{text}, same next token {trained['equal_tokens']:.1%}"))
        if trained["mean_kl"] > _LARGE_KL:
            text = "the merged model answers otherwise than the trained one: write `--base dequantized` to merge into "
            lines.append(("note", f"{text}the weights of training"))
    return lines
