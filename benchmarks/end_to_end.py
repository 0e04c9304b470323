"""From Enter to a saved model: `python -m trl_sft` against `trl sft --config` on the same rows and settings.

    python benchmarks/end_to_end.py ROWS.jsonl [PAIRS]

ROWS are questions and answers (GSM8K's file, say). Ten steps of 4 packs of 1,024 tokens on a Llama of 5 M parameters
with 32,000 words, made here; each run in a fresh process with an empty cache, in turn, order swapped. Both log the loss
of every step, which is compared: the same packs in the same order.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import prepare
import step

STEPS = 10


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


def run(side, folder):
    """Run one side in a folder of its own; return seconds and losses."""
    with tempfile.TemporaryDirectory() as cache:
        out = Path(cache) / "out"
        ours = [sys.executable, "-m", "trl_sft", str(folder / "recipe.yaml"), f"train.output_dir={out}"]
        trl = [str(Path(sys.executable).parent / "trl"), "sft", "--config", str(folder / "trl.yaml")]
        command = ours if side == "ours" else [*trl, "--output_dir", str(out)]
        quiet = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        began = time.perf_counter()
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | quiet)
        seconds = time.perf_counter() - began
        if done.returncode or not list(out.glob("model*.safetensors")):
            raise SystemExit((done.stdout + done.stderr)[-3000:])
        if side == "ours":
            entries = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            return seconds, [entry["loss"] for entry in entries if "loss" in entry]
    losses = re.findall(r"'loss': '?([\d.]+)", done.stdout + done.stderr)
    return seconds, [float(loss) for loss in losses]


def main(rows, pairs):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, rows)
        found = {"ours": [], "trl": []}
        for n in range(pairs):
            for side in ("ours", "trl") if n % 2 == 0 else ("trl", "ours"):
                found[side].append(run(side, folder))
        mine, theirs = found["ours"][0][1], found["trl"][0][1]
        assert len(mine) == len(theirs) == STEPS, (mine, theirs)
        # TRL prints four digits
        print(f"losses: {mine[0]:.4f} to {mine[-1]:.4f}, TRL's {theirs[0]:.4f} to {theirs[-1]:.4f}")
        assert all(abs(a - b) < 6e-3 for a, b in zip(mine, theirs, strict=True)), (mine, theirs)
        ours, trl = (statistics.median(seconds for seconds, _ in found[side]) for side in ("ours", "trl"))
        ratios = sorted(a[0] / b[0] for a, b in zip(found["ours"], found["trl"], strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"ours {ours:.1f} s, trl sft {trl:.1f} s, ratio {spread}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        print("skipped: needs a file of rows, python benchmarks/end_to_end.py ROWS.jsonl")
    else:
        main(sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 3)
