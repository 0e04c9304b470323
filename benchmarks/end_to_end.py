"""Times a run from Enter to the saved model: `python -m trl_sft` against `trl sft --config`, or against axolotl.

    python benchmarks/end_to_end.py ROWS.jsonl [PAIRS] [--axolotl COMMAND] [--without-trl]

ROWS are questions and answers (GSM8K's file, for instance). Ten steps of 4 packs of 1,024 tokens train a Llama of 5 M
parameters with a vocabulary of 32,000, which is made here. Each run is a fresh process with an empty cache; the runs
alternate. trl_sft and TRL train the same packs in the same order, so the losses of all steps are compared.

COMMAND starts axolotl (the `axolotl` of an environment of its own) with the configuration that `other_trainers.py`
writes. axolotl packs in another way and order, so the losses of single steps differ. Therefore both first train three
steps of 4 unpacked rows in the order of the file, whose losses must be equal (same weights, rows, template, labels,
learning rate). With packing the means of ten losses must then be within 5%.
"""

import argparse
import json
import os
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import other_trainers
import prepare
import step
import yaml

STEPS, UNPACKED_STEPS = 10, 3


def write_work(folder, path):
    """Write model, tokenizer (trained on the rows), rows, and the configurations of trl_sft and TRL."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    rows = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=step.VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator((row["question"] + "\n" + row["answer"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    template = (Path(__file__).parents[1] / "trl_sft" / "templates" / "chatml.jinja").read_text()
    # without the newline after the end-of-turn token the labels of both are equal
    tokenizer.chat_template = template.replace("    {{- '\\n' }}\n", "")
    tokenizer.save_pretrained(folder / "model")
    step.build_model().save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            turns = {"prompt": [prepare.make_turn("user", row["question"])]}
            turns["completion"] = [prepare.make_turn("assistant", row["answer"])]
            file.write(json.dumps(turns, ensure_ascii=False) + "\n")
    train = {
        **{"max_steps": STEPS, "per_device_train_batch_size": 4, "packing": True, "max_length": 1024, "seed": 1},
        **{"learning_rate": 1e-3, "logging_steps": 1, "report_to": "none", "save_strategy": "no", "bf16": False},
    }
    recipe = {"model": {"name_or_path": "./model"}, "data": {"train": "rows.jsonl"}, "train": train, "evaluate": False}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    config = {"model_name_or_path": str(folder / "model"), "use_cpu": True, "dtype": "float32"}
    config |= {"datasets": [{"path": "json", "data_files": str(folder / "rows.jsonl")}]}
    (folder / "trl.yaml").write_text(json.dumps(config | train))


def write_axolotl(folder):
    """Write axolotl's configurations: of the work, and of three unpacked steps in the order of the rows."""
    other_trainers.write(other_trainers.prepare(folder / "recipe.yaml", folder / "others"))
    config = yaml.safe_load((folder / "others" / "axolotl.yaml").read_text()) | {"dataset_prepared_path": None}
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(config))
    unpacked = {"max_steps": UNPACKED_STEPS, "sample_packing": False, "curriculum_sampling": True}
    (folder / "axolotl-unpacked.yaml").write_text(yaml.safe_dump(config | unpacked))


def make_command(side, folder, *, packed, axolotl):
    """Return the command of a side, without its output folder."""
    if side == "axolotl":
        config = folder / ("axolotl.yaml" if packed else "axolotl-unpacked.yaml")
        return [*axolotl, "train", str(config), "--launcher", "python"]
    if side == "trl":
        return [str(Path(sys.executable).parent / "trl"), "sft", "--config", str(folder / "trl.yaml")]
    unpacked = [f"train.max_steps={UNPACKED_STEPS}", "train.packing=false", "train.train_sampling_strategy=sequential"]
    return [sys.executable, "-m", "trl_sft", str(folder / "recipe.yaml"), *(() if packed else unpacked)]


def run(side, folder, *, packed=True, axolotl=()):
    """Run one side in a folder of its own; return wall seconds, losses and CPU seconds."""
    with tempfile.TemporaryDirectory() as cache:
        out = Path(cache) / "out"
        output = {
            "trl_sft": [f"train.output_dir={out}"],
            "trl": ["--output_dir", str(out)],
            "axolotl": [f"--output-dir={out}"],
        }
        words = [*make_command(side, folder, packed=packed, axolotl=axolotl), *output[side]]
        environment = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        environment |= {"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.run(
            words, check=False, capture_output=True, text=True, env=os.environ | environment, cwd=cache
        )
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        cpu_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if process.returncode or not list(out.glob("model*.safetensors")):
            raise SystemExit((process.stdout + process.stderr)[-3000:])
        if side == "trl_sft":
            entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            return seconds, [entry["loss"] for entry in entries if "loss" in entry], cpu_seconds
    losses = re.findall(r"'loss': '?([\d.]+)", process.stdout + process.stderr)
    return seconds, [float(loss) for loss in losses], cpu_seconds


def measure_pairs(other, folder, *, pairs, axolotl):
    """Run trl_sft and another trainer in turn; return the results by side."""
    results = {"trl_sft": [], other: []}
    for n in range(pairs):
        for side in ("trl_sft", other) if n % 2 == 0 else (other, "trl_sft"):
            results[side].append(run(side, folder, axolotl=axolotl))
    return results


def print_ratios(other, name, results):
    """Print times and ratios, of wall time and of CPU time, which other work on the machine disturbs less."""
    for column, title in ((0, "wall time"), (2, "CPU time")):
        seconds, other_seconds = (
            statistics.median(result[column] for result in results[side]) for side in ("trl_sft", other)
        )
        ratios = sorted(a[column] / b[column] for a, b in zip(results["trl_sft"], results[other], strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{title}: trl_sft {seconds:.1f} s, {name} {other_seconds:.1f} s, ratio {spread}", flush=True)


def main(rows, *, pairs, axolotl, without_trl):
    """Compare the losses, then print times and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_work(folder, rows)
        if not without_trl:
            results = measure_pairs("trl", folder, pairs=pairs, axolotl=axolotl)
            losses, other_losses = results["trl_sft"][0][1], results["trl"][0][1]
            assert len(losses) == len(other_losses) == STEPS, (losses, other_losses)
            # TRL prints four digits
            print(f"losses: {losses[0]:.4f} to {losses[-1]:.4f}, TRL's {other_losses[0]:.4f} to {other_losses[-1]:.4f}")
            assert all(abs(a - b) < 6e-3 for a, b in zip(losses, other_losses, strict=True)), (losses, other_losses)
            print_ratios("trl", "trl sft", results)
        if axolotl:
            write_axolotl(folder)
            losses = run("trl_sft", folder, packed=False)[1]
            other_losses = run("axolotl", folder, packed=False, axolotl=axolotl)[1]
            # it prints four digits too
            print(f"three unpacked steps: losses {losses}, axolotl's {other_losses}", flush=True)
            assert len(losses) == len(other_losses) == UNPACKED_STEPS, (losses, other_losses)
            assert all(abs(a - b) < 6e-3 for a, b in zip(losses, other_losses, strict=True)), (losses, other_losses)
            results = measure_pairs("axolotl", folder, pairs=pairs, axolotl=axolotl)
            losses, other_losses = (results[side][0][1] for side in ("trl_sft", "axolotl"))
            means = statistics.mean(losses), statistics.mean(other_losses)
            ranges = f"{losses[0]:.4f} to {losses[-1]:.4f}, axolotl's {other_losses[0]:.4f} to {other_losses[-1]:.4f}"
            print(f"packed: losses {ranges}; means {means[0]:.4f}, {means[1]:.4f}")
            assert len(losses) == len(other_losses) == STEPS, (losses, other_losses)
            assert abs(means[0] / means[1] - 1) < 0.05, means
            print_ratios("axolotl", "axolotl", results)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?")
    parser.add_argument("pairs", nargs="?", type=int, default=3)
    parser.add_argument("--axolotl", type=shlex.split, default=[], metavar="COMMAND")
    parser.add_argument("--without-trl", action="store_true")
    options = parser.parse_args()
    if options.rows is None:
        print("skipped: name a file of rows, python benchmarks/end_to_end.py ROWS.jsonl")
    else:
        main(options.rows, pairs=options.pairs, axolotl=options.axolotl, without_trl=options.without_trl)
