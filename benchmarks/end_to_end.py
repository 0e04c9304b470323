"""From Enter to a saved model: `python -m trl_sft` against `trl sft --config` on the same rows and settings.

    python benchmarks/end_to_end.py ROWS.jsonl [PAIRS] [--axolotl COMMAND] [--without-trl]

ROWS are questions and answers (GSM8K's file, say). Ten steps of 4 packs of 1,024 tokens on a Llama of 5 M parameters
with 32,000 words, made here; each run in a fresh process with an empty cache, in turn, order swapped. Both log the loss
of every step, which is compared: the same packs in the same order.

COMMAND starts axolotl (the `axolotl` of an environment of its own); its configuration is the one that `others.py`
writes. Its packs are put together in another way and drawn in another order, so their losses cannot be compared step
by step. So first both train three steps of 4 unpacked rows in the order of the file, and those losses have to be equal
(same weights, rows, template, labels, learning rate); then, packed, the means of ten losses have to be within 5%.
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

STEPS, PROOF = 10, 3


def build(folder, rows):
    """Write model, tokenizer (trained on the rows), the rows in TRL's form, and both configurations."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    given = [json.loads(line) for line in Path(rows).read_text(encoding="utf-8").splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=step.VOCABULARY, special_tokens=special, initial_alphabet=alphabet)
    bpe.train_from_iterator((row["question"] + "\n" + row["answer"] for row in given), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    template = (Path(__file__).parents[1] / "trl_sft" / "templates" / "chatml.jinja").read_text()
    tokenizer.chat_template = template.replace(
        "    {{- '\\n' }}\n", ""
    )  # no newline after the end: labels are then equal
    tokenizer.save_pretrained(folder / "model")
    step.model().save_pretrained(folder / "model")
    with (folder / "rows.jsonl").open("w", encoding="utf-8") as file:
        for row in given:
            turns = {"prompt": [prepare.turn("user", row["question"])]}
            turns["completion"] = [prepare.turn("assistant", row["answer"])]
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


def for_axolotl(folder):
    """Write axolotl's configurations: of the work, and of three unpacked steps in the order of the rows."""
    other_trainers.write(other_trainers.prepare(folder / "recipe.yaml", folder / "others"))
    config = yaml.safe_load((folder / "others" / "axolotl.yaml").read_text()) | {"dataset_prepared_path": None}
    (folder / "axolotl.yaml").write_text(yaml.safe_dump(config))
    few = {"max_steps": PROOF, "sample_packing": False, "curriculum_sampling": True}
    (folder / "axolotl-proof.yaml").write_text(yaml.safe_dump(config | few))


def command(side, folder, proof, axolotl):
    """Return the command of a side, without the folder that it writes to."""
    if side == "axolotl":
        return [*axolotl, "train", str(folder / f"axolotl{'-proof' if proof else ''}.yaml"), "--launcher", "python"]
    if side == "trl":
        return [str(Path(sys.executable).parent / "trl"), "sft", "--config", str(folder / "trl.yaml")]
    few = [f"train.max_steps={PROOF}", "train.packing=false", "train.train_sampling_strategy=sequential"]
    return [sys.executable, "-m", "trl_sft", str(folder / "recipe.yaml"), *(few if proof else ())]


def run(side, folder, proof=False, axolotl=()):
    """Run one side in a folder of its own; return seconds, losses and seconds of a processor."""
    with tempfile.TemporaryDirectory() as cache:
        out = Path(cache) / "out"
        place = {
            "ours": [f"train.output_dir={out}"],
            "trl": ["--output_dir", str(out)],
            "axolotl": [f"--output-dir={out}"],
        }
        words = [*command(side, folder, proof, axolotl), *place[side]]
        quiet = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        quiet |= {"AXOLOTL_DO_NOT_TRACK": "1", "CUDA_VISIBLE_DEVICES": ""}
        began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(words, check=False, capture_output=True, text=True, env=os.environ | quiet, cwd=cache)
        seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
        busy = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        if done.returncode or not list(out.glob("model*.safetensors")):
            raise SystemExit((done.stdout + done.stderr)[-3000:])
        if side == "ours":
            entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            return seconds, [entry["loss"] for entry in entries if "loss" in entry], busy
    losses = re.findall(r"'loss': '?([\d.]+)", done.stdout + done.stderr)
    return seconds, [float(loss) for loss in losses], busy


def measured(other, folder, pairs, axolotl):
    """Run ours and another in turn; return both, by side."""
    found = {"ours": [], other: []}
    for n in range(pairs):
        for side in ("ours", other) if n % 2 == 0 else (other, "ours"):
            found[side].append(run(side, folder, axolotl=axolotl))
    return found


def printed(other, name, found):
    """Print times and ratios: of the wall's clock, and of processors, which other work on the machine disturbs less."""
    for at, what in ((0, "wall"), (2, "processors")):
        ours, theirs = (statistics.median(one[at] for one in found[side]) for side in ("ours", other))
        ratios = sorted(a[at] / b[at] for a, b in zip(found["ours"], found[other], strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{what}: ours {ours:.1f} s, {name} {theirs:.1f} s, ratio {spread}", flush=True)


def main(rows, pairs, axolotl, without_trl):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, rows)
        if not without_trl:
            found = measured("trl", folder, pairs, axolotl)
            mine, theirs = found["ours"][0][1], found["trl"][0][1]
            assert len(mine) == len(theirs) == STEPS, (mine, theirs)
            # TRL prints four digits
            print(f"losses: {mine[0]:.4f} to {mine[-1]:.4f}, TRL's {theirs[0]:.4f} to {theirs[-1]:.4f}")
            assert all(abs(a - b) < 6e-3 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)
            printed("trl", "trl sft", found)
        if axolotl:
            for_axolotl(folder)
            mine, theirs = (run(side, folder, proof=True, axolotl=axolotl)[1] for side in ("ours", "axolotl"))
            # it prints four digits too
            print(f"three unpacked steps: losses {mine}, axolotl's {theirs}", flush=True)
            assert len(mine) == len(theirs) == PROOF, (mine, theirs)
            assert all(abs(a - b) < 6e-3 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)
            found = measured("axolotl", folder, pairs, axolotl)
            mine, theirs = (found[side][0][1] for side in ("ours", "axolotl"))
            means = statistics.mean(mine), statistics.mean(theirs)
            told = f"{mine[0]:.4f} to {mine[-1]:.4f}, axolotl's {theirs[0]:.4f} to {theirs[-1]:.4f}"
            print(f"packed: losses {told}; means {means[0]:.4f}, {means[1]:.4f}")
            assert len(mine) == len(theirs) == STEPS, (mine, theirs)
            assert abs(means[0] / means[1] - 1) < 0.05, means
            printed("axolotl", "axolotl", found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="?")
    parser.add_argument("pairs", nargs="?", type=int, default=3)
    parser.add_argument("--axolotl", type=shlex.split, default=[], metavar="COMMAND")
    parser.add_argument("--without-trl", action="store_true")
    given = parser.parse_args()
    if given.rows is None:
        print("skipped: needs a file of rows, python benchmarks/end_to_end.py ROWS.jsonl")
    else:
        main(given.rows, given.pairs, given.axolotl, given.without_trl)
