"""How far exported models are from the trained ones: for each model and format KL, equal answers, sizes, seconds.

    python benchmarks/export.py [RUN ...] [--to FORMATS] [--gguf-types TYPES] [--steps N] [--models NAMES]
                                [--kinds KINDS] [--json FILE]

With RUN the runs in these folders are exported. Without, models are trained first: the embedded model and random ones
of five architectures (Llama, Qwen2, Gemma, Phi, Mistral) that share its tokenizer, each with all weights, LoRA and
QLoRA, on the rows of the quickstart. Every number is from export.json, so it is the proof of the command itself; an
export that the proof refuses is listed with its reason. Divergences are in nats, KL(trained || exported).
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
EMBEDDED = ROOT / "trl_sft" / "embedded"
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "vocab_size": 512}
ARCHITECTURES = {"Llama": {}, "Qwen2": {}, "Gemma": {"head_dim": 32}, "Phi": {"num_key_value_heads": 4}, "Mistral": {}}
KINDS = {
    "full": "",
    "LoRA": "lora: {r: 8, target_modules: all-linear}\n",
    "QLoRA": "lora: {r: 8, target_modules: all-linear}\nquantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4}\n",
}
RATES = {"full": 1e-3, "LoRA": 5e-3, "QLoRA": 5e-3}
RECIPE = """\
model: {{name_or_path: {model}}}
data:
  train: {{path: trl_sft:skills, split: train}}
  eval: {{path: trl_sft:skills, split: test, max_rows: 40}}
{adapter}evaluate: {{max_rows: 40, generation: {{max_new_tokens: 8}}}}
train:
  output_dir: {folder}
  max_steps: {steps}
  per_device_train_batch_size: 16
  learning_rate: {rate}
  save_strategy: 'no'
"""
HEAD = "| model | training | export | reader | KL mean | KL worst | equal answers | prompts | MiB | seconds |"


def build(name: str, folder: Path) -> Path:
    """Write a random model of an architecture with the embedded tokenizer; return its folder."""
    import torch
    import transformers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED / "tiny")
    tokens = {f"{key}_token_id": getattr(tokenizer, f"{key}_token_id") for key in ("bos", "eos", "pad")}
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | tokens | ARCHITECTURES[name])
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(model: str, kind: str, folder: Path, steps: int) -> Path:
    """Train a model; return the folder of the run."""
    recipe = folder.with_suffix(".yaml")
    values = {"model": model, "adapter": KINDS[kind], "folder": folder, "steps": steps, "rate": RATES[kind]}
    recipe.write_text(RECIPE.format(**values), encoding="utf-8")
    call([str(recipe)])
    return folder


def call(words: list[str]) -> int:
    """Run a command of this package in this process, silently; return the exit code."""
    import contextlib
    import gc
    import io

    from trl_sft import cli

    errors = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(errors):
        code = cli.main(words)
    gc.collect()
    if code != 0:
        print(f"exit {code}: {' '.join(words)}\n{(output.getvalue() + errors.getvalue())[-1500:]}", file=sys.stderr)
    return code


def export(run: Path, formats: str, kind: str, folder: Path) -> dict | None:
    """Export a run with one type of GGUF; return export.json with the seconds; None = it was refused."""
    began = time.perf_counter()
    code = call(["export", str(run), "--to", formats, "--gguf-type", kind, "-o", str(folder)])
    if code != 0:
        return None
    record = json.loads((folder / "export.json").read_text(encoding="utf-8"))
    return record | {"command_seconds": round(time.perf_counter() - began, 1)}


def measure(run: Path, options: argparse.Namespace, work: Path) -> list[dict]:
    """Export a run in all formats; return one mapping for each reader of each export."""
    rows = []
    for number, kind in enumerate(options.gguf_types.split(",")):
        formats = options.to if number == 0 else "gguf"  # the other formats do not depend on the type
        folder = work / "export"
        record = export(run, formats, kind, folder)
        if record is None:
            rows.append({"export": f"{formats} {kind}", "reader": "refused"})
        else:
            rows += list_rows(record)
        shutil.rmtree(folder, ignore_errors=True)
    return rows


def list_rows(record: dict) -> list[dict]:
    """Return one mapping for each reader of each export of export.json."""
    rows = []
    for export in record["proof"]["exports"]:
        entry = record["formats"].get(export["format"], {})
        title = {"export": f"{export['format']} {export['type']}"}
        title |= {"bytes": entry.get("bytes"), "seconds": entry.get("seconds")}
        rows += [title | describe_reader(reader) for reader in export["readers"]]
    base = record["proof"]["base"]
    command = {"export": "all, with the proof", "reader": "base model", "seconds": record["command_seconds"]}
    return [*rows, command | ({} if base is None else base)]


def describe_reader(reader: dict) -> dict:
    """Return the numbers of one reader."""
    prompts = reader["prompts"]
    return {
        "reader": reader["reader"],
        "mean_kl": reader["mean_kl"],
        "worst_kl": reader["worst_kl"],
        "equal": f"{reader['equal_answers']}/{reader['answers']}",
        "prompts": f"{prompts.get('equal')}/{prompts.get('compared')}",
    }


def print_row(model: str, kind: str, row: dict) -> None:
    """Print a line of the table."""
    numbers = [f"{row[key]:.1e}" if row.get(key) is not None else "" for key in ("mean_kl", "worst_kl")]
    size = f"{row['bytes'] / 2**20:.1f}" if row.get("bytes") else ""
    cells = [model, kind, row["export"], row["reader"], *numbers, row.get("equal", ""), row.get("prompts", ""), size]
    print("| " + " | ".join(map(str, [*cells, row.get("seconds", "")])) + " |", flush=True)


def make_runs(options: argparse.Namespace, work: Path) -> Iterator[tuple[str, str, Path]]:
    """Yield model, kind of training and folder of each run: those that are named, else new ones, each once trained."""
    for run in options.runs:
        yield run.name, "", run
    for kind in [] if options.runs else options.kinds.split(","):
        for model in options.models.split(","):
            source = "trl_sft:tiny" if model == "tiny" else str(work / model)
            if model != "tiny" and not (work / model).is_dir():
                build(model, work / model)
            yield model, kind, train(source, kind, work / f"{model}-{kind}", options.steps)


def parse() -> argparse.Namespace:
    """Return the arguments."""
    parser = argparse.ArgumentParser(description="Distances of exported models from the trained ones.")
    parser.add_argument("runs", metavar="RUN", nargs="*", type=Path, help="the folder of a run")
    parser.add_argument("--to", default="merged,gguf", help="formats of the first export")
    parser.add_argument("--gguf-types", default="f16,q8_0", help="types of GGUF files, an export for each")
    parser.add_argument("--steps", type=int, default=60, help="of training, without RUN")
    parser.add_argument("--models", default=",".join(["tiny", *ARCHITECTURES]), help="without RUN")
    parser.add_argument("--kinds", default=",".join(KINDS), help="of training, without RUN")
    parser.add_argument("--json", type=Path, help="a file for all numbers")
    return parser.parse_args()


def main() -> None:
    """Train where no run is named, export, print."""
    options = parse()
    results = []
    print(HEAD + "\n" + "|---" * HEAD.count(" | ") + "|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        for model, kind, run in make_runs(options, work):
            for row in measure(run, options, work):
                print_row(model, kind, row)
                results.append({"model": model, "training": kind} | row)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
