"""Measures what a setting gains: training tokens/s with and without it. `check` recommends settings by these results.

    python benchmarks/settings.py [PAIRS]

The model of `step.py` (5 M parameters, a vocabulary of 32,000, float32, trl_sft's loss and attention) on 192 rows of 20
to 1,000 tokens, of which the last third has a label; one epoch. Padding does not count as tokens. Settings that leave
the batches as they are must give the same losses (bfloat16: to 1%). Packing and grouping train the same tokens in other
batches.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import step

ROWS, BATCH = 192, 8
BASE = {"per_device_train_batch_size": BATCH, "optim": "adamw_torch_fused", "max_length": 1024, "num_train_epochs": 1}
BASE |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
BASE |= {
    "logging_steps": 1,
    "report_to": "none",
    "save_strategy": "no",
    "dataset_kwargs": {"skip_prepare_dataset": True},
}
# name -> SFTConfig's arguments, and how far losses may differ (None = the batches differ)
SETTINGS = {
    "packing": ({"packing": True, "max_length": 1024, "per_device_train_batch_size": 2}, None),
    "train_sampling_strategy: group_by_length": ({"train_sampling_strategy": "group_by_length"}, None),
    "optim: adamw_torch (not fused)": ({"optim": "adamw_torch"}, 1e-5),
    "gradient_checkpointing: true (TRL's default)": ({"gradient_checkpointing": True}, 1e-6),
    "bf16": ({"bf16": True}, 1e-2),
    "dataloader_num_workers: 2": ({"dataloader_num_workers": 2}, 1e-6),
    "torch_compile": ({"torch_compile": True}, 1e-4),
}


def build_rows():
    """Return tokens and labels of rows whose lengths vary as those of answers do."""
    import numpy as np

    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(5.2, 0.7, ROWS), 20, 1000).astype(int).tolist()
    ids = [rng.integers(5, step.VOCABULARY, length).tolist() for length in lengths]
    return {"input_ids": ids, "labels": [mask_prompt(row) for row in ids]}


def mask_prompt(ids):
    """Return labels for the last third of a row."""
    start = len(ids) * 2 // 3
    return [-100] * start + ids[start:]


def measure_setting(name):
    """Train with one setting, "" = without; print the rate and the losses as a line of JSON."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    from trl_sft.model import cpu_loss, packed_attention

    class StepTimer(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    times = []
    setting = SETTINGS[name][0] if name else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "e": 1})), eos_token="e")
    tokenizer.pad_token = "e"
    data = Dataset.from_dict(build_rows())
    if setting.get("packing"):
        data = pack_dataset(data, 1024, "bfd")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, **BASE | setting)
        trainer = SFTTrainer(
            step.build_model(), args=args, train_dataset=data, processing_class=tokenizer, callbacks=[StepTimer()]
        )
        cpu_loss.install(trainer.model, cpu_loss.LOGITS_GIB)
        packed_attention.install(trainer.model)
        began = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = sum(map(len, build_rows()["input_ids"]))
    # the first step starts workers and compiles, so it is reported by itself
    seconds = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    print(json.dumps({"rate": total / seconds, "first": times[0] - began, "losses": losses, "tokens": total}))


def run(name):
    """Train with one setting in a fresh process; return what it measured, or the last line of its error."""
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    environment["THP_MEM_ALLOC_ENABLE"] = "1"  # as a run sets it
    command = [sys.executable, __file__, "--work", name]
    process = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if process.returncode:
        return process.stderr.strip().splitlines()[-1][:200]
    return json.loads(process.stdout.strip().splitlines()[-1])


def main(pairs):
    """Compare the losses, then print what each setting gains."""
    for name, (_, tolerance) in SETTINGS.items():
        measurements = {"": [], name: []}
        for n in range(pairs):
            for side in ("", name) if n % 2 == 0 else (name, ""):
                measurements[side].append(run(side))
        failed = next((result for result in measurements[name] if isinstance(result, str)), None)
        if failed:
            print(f"{name}: skipped: {failed}", flush=True)
            continue
        if tolerance is not None:
            losses = zip(measurements[""][0]["losses"], measurements[name][0]["losses"], strict=True)
            difference = max(abs(a - b) / abs(a) for a, b in losses)
            assert difference < tolerance, (name, difference)
            equal = f"losses differ by {difference:.0e} at most"
        else:
            equal = f"{measurements[name][0]['tokens']:,} tokens on both sides, in other batches"
        ratios = sorted(b["rate"] / a["rate"] for a, b in zip(measurements[""], measurements[name], strict=True))
        before, after = (statistics.median(result["rate"] for result in measurements[side]) for side in ("", name))
        spread = f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        first = statistics.median(
            b["first"] - a["first"] for a, b in zip(measurements[""], measurements[name], strict=True)
        )
        print(
            f"{name}: {before:,.0f} -> {after:,.0f} tokens/s, {spread}, first step {first:+.1f} s; {equal}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        measure_setting(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
