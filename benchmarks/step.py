"""Times a training step of trl_sft against plain SFTTrainer on the same packs; compares the losses first.

    python benchmarks/step.py [PAIRS] [--alone]

4 packs of 1,024 tokens, a vocabulary of 32,000, a Llama of about 5 M parameters in float32, AdamW. First every position
has a label, then a third of them (the answers). Each side runs in a fresh process, in turn, in alternating order; the
time of a step is the median of all but the first. "arithmetic" is a lower bound: the same matrix products without a
trainer, each document by itself, with PyTorch's cross entropy. trl_sft changes three things: the loss, attention by
document, and huge pages for large tensors; --alone measures each of them too.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

STEPS, PACKS, LENGTH, VOCABULARY = 6, 4, 1024, 32_000
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
ARITHMETIC = "arithmetic"
SIDES, ALONE = ("trl_sft", "trl", ARITHMETIC), ("loss alone", "attention alone", "huge pages alone")
HUGE_PAGES = ("trl_sft", "huge pages alone", ARITHMETIC)  # a run turns them on before torch allocates


def build_model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE))


def build_packs(share):
    """Return packs of documents of 60 to 240 tokens; `share` of each document's end has labels."""
    import numpy as np

    rng = np.random.default_rng(0)
    packs = {"input_ids": [], "labels": [], "seq_lengths": []}
    for _ in range(PACKS * STEPS):
        lengths = []
        while sum(lengths) < LENGTH:
            lengths.append(int(min(rng.integers(60, 240), LENGTH - sum(lengths))))
        ids = rng.integers(5, VOCABULARY, LENGTH)
        labels, start = np.full(LENGTH, -100), 0
        for length in lengths:
            first = start + round(length * (1 - share))
            labels[first : start + length] = ids[first : start + length]
            start += length
        packs["input_ids"].append(ids.tolist())
        packs["labels"].append(labels.tolist())
        packs["seq_lengths"].append(lengths)
    return packs


def measure_side(side, share):
    """Train a few steps on one side; print seconds, memory and logged values as a line of JSON."""
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.began)

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "e": 1})), eos_token="e")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            **{"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
            **{"packing": True, "max_length": LENGTH, "per_device_train_batch_size": PACKS, "max_steps": STEPS},
            **{"logging_steps": 1, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False},
        )
        rows = Dataset.from_dict(build_packs(share))
        trainer = SFTTrainer(
            build_model(), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[StepTimer()]
        )
        if side in ("trl_sft", "loss alone"):
            from trl_sft.model import cpu_loss

            assert cpu_loss.install(trainer.model, cpu_loss.LOGITS_GIB)
        if side in ("trl_sft", "attention alone"):
            from trl_sft.model import packed_attention

            assert packed_attention.install(trainer.model)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    logged = {name: [entry[name] for entry in entries] for name in LOGGED}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"seconds": statistics.median(times[1:]), "mib": round(peak), "threads": torch.get_num_threads()} | logged
        )
    )


def measure_arithmetic(share):
    """Time forward and backward of the arithmetic: the model on each document, the head on positions with a label."""
    import torch

    model, rows = build_model(), build_packs(share)
    times = []
    for step in range(4):
        began = time.perf_counter()
        count = sum(label != -100 for pack in range(PACKS) for label in rows["labels"][step * PACKS + pack])
        for pack in range(step * PACKS, (step + 1) * PACKS):
            start, hidden, labels = 0, [], []
            for length in rows["seq_lengths"][pack]:
                ids = torch.tensor([rows["input_ids"][pack][start : start + length]])
                hidden.append(model.model(ids, use_cache=False).last_hidden_state[0, :-1])
                labels.append(torch.tensor(rows["labels"][pack][start + 1 : start + length]))
                start += length
            hidden, labels = torch.cat(hidden), torch.cat(labels)
            logits = model.lm_head(hidden[labels != -100])
            (torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum") / count).backward()
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": statistics.median(times[1:])}))


def run(*words):
    """Run one side in a fresh process; return what it measured."""
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    environment["THP_MEM_ALLOC_ENABLE"] = str(int(words[0] in HUGE_PAGES))
    process = subprocess.run(
        [sys.executable, __file__, "--work", *words],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    if process.returncode:
        raise SystemExit(process.stderr[-3000:])
    return json.loads(process.stdout.strip().splitlines()[-1])


def main(pairs, sides):
    """Compare the logged values, then print times and ratios."""
    for share in ("1.0", "0.33"):
        measurements = {side: [] for side in sides}
        for n in range(pairs):
            for side in sides[:: 1 if n % 2 == 0 else -1]:
                measurements[side].append(run(side, share))
        for name in LOGGED:
            expected = measurements["trl"][0][name]
            difference = max(
                abs(a - b) / max(abs(b), 1e-9) for a, b in zip(measurements["trl_sft"][0][name], expected, strict=True)
            )
            assert difference < 1e-4 or name == "mean_token_accuracy", (name, difference)
            print(f"  {name}: differs by {difference:.1e} at most, of {expected[0]:.6g}")
        threads = measurements["trl_sft"][0]["threads"]
        print(f"{float(share):.0%} of the positions have a label; {threads} threads, {pairs} pairs")
        for side in sides:
            seconds = statistics.median(run["seconds"] for run in measurements[side])
            memory = f", {measurements[side][0]['mib']:,} MiB at most" if "mib" in measurements[side][0] else ""
            speed = format_ratio(measurements, "trl", side)
            print(f"  {side:<16} {seconds:5.2f} s a step, {speed} times as fast as TRL{memory}")
        slowdown = format_ratio(measurements, "trl_sft", ARITHMETIC)
        print(f"  trl_sft takes {slowdown} times as long as the arithmetic alone", flush=True)


def format_ratio(measurements, numerator, denominator):
    """Return the median ratio of the pairs, with the smallest and the largest."""
    pairs = zip(measurements[numerator], measurements[denominator], strict=True)
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        side, share = sys.argv[2], float(sys.argv[3])
        measure_arithmetic(share) if side == ARITHMETIC else measure_side(side, share)
    else:
        numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
        main(*numbers or [3], (*SIDES, *ALONE) if "--alone" in sys.argv else SIDES)
