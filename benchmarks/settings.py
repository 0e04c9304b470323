"""What a setting gains: tokens trained a second with it and without, in turn; what `check` advises is measured here.

    python benchmarks/settings.py [PAIRS]

The model of `step.py` (5 M parameters, 32,000 words, float32, our loss and attention) on 192 rows of 20 to 1,000
tokens, the last third of each with loss; one pass. Padding is no token. Settings that leave the batches as they are
have to give the same losses (bfloat16: to 1%); packing and grouping train the same tokens in other batches.
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
# name -> SFTConfig's arguments, and how far losses may differ (None: other batches)
SETTINGS = {
    "packing": ({"packing": True, "max_length": 1024, "per_device_train_batch_size": 2}, None),
    "train_sampling_strategy: group_by_length": ({"train_sampling_strategy": "group_by_length"}, None),
    "optim: adamw_torch (not fused)": ({"optim": "adamw_torch"}, 1e-5),
    "gradient_checkpointing: true (TRL's default)": ({"gradient_checkpointing": True}, 1e-6),
    "bf16": ({"bf16": True}, 1e-2),
    "dataloader_num_workers: 2": ({"dataloader_num_workers": 2}, 1e-6),
    "torch_compile": ({"torch_compile": True}, 1e-4),
}


def rows():
    """Return tokens and labels of rows whose lengths spread as answers' do."""
    import numpy as np

    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(5.2, 0.7, ROWS), 20, 1000).astype(int).tolist()
    ids = [draw.integers(5, step.VOCABULARY, length).tolist() for length in lengths]
    return {"input_ids": ids, "labels": [[-100] * (len(i) * 2 // 3) + i[len(i) * 2 // 3 :] for i in ids]}


def work(name):
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer
    from trl.data_utils import pack_dataset

    from trl_sft.model import cpu_loss, packed_attention

    class Clock(TrainerCallback):
        def on_step_end(self, *_, **__):
            times.append(time.perf_counter())

    times = []
    given = SETTINGS[name][0] if name else {}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "e": 1})), eos_token="e")
    tokenizer.pad_token = "e"
    data = Dataset.from_dict(rows())
    if given.get("packing"):
        data = pack_dataset(data, 1024, "bfd")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(output_dir=folder, **BASE | given)
        trainer = SFTTrainer(
            step.model(), args=args, train_dataset=data, processing_class=tokenizer, callbacks=[Clock()]
        )
        cpu_loss.install(trainer.model, cpu_loss.LOGITS_GIB)
        packed_attention.install(trainer.model)
        began = time.perf_counter()
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    total = sum(map(len, rows()["input_ids"]))
    # the first step makes workers and compiles; it is told apart, and the pass is counted without it
    rest = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    print(json.dumps({"rate": total / rest, "first": times[0] - began, "losses": losses, "tokens": total}))


def run(name):
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    quiet["THP_MEM_ALLOC_ENABLE"] = "1"  # as a run sets it
    command = [sys.executable, __file__, "--work", name]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | quiet)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1][:200]
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(pairs):
    for name, (_, close) in SETTINGS.items():
        found = {"": [], name: []}
        for n in range(pairs):
            for side in ("", name) if n % 2 == 0 else (name, ""):
                found[side].append(run(side))
        failed = next((one for one in found[name] if isinstance(one, str)), None)
        if failed:
            print(f"{name}: skipped: {failed}", flush=True)
            continue
        if close is not None:
            pairs_of = zip(found[""][0]["losses"], found[name][0]["losses"], strict=True)
            worst = max(abs(a - b) / abs(a) for a, b in pairs_of)
            assert worst < close, (name, worst)
            equal = f"losses differ by {worst:.0e} at most"
        else:
            equal = f"{found[name][0]['tokens']:,} tokens on both sides, in other batches"
        ratios = sorted(b["rate"] / a["rate"] for a, b in zip(found[""], found[name], strict=True))
        without, with_it = (statistics.median(one["rate"] for one in found[side]) for side in ("", name))
        spread = f"{statistics.median(ratios):.2f} times ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        first = statistics.median(b["first"] - a["first"] for a, b in zip(found[""], found[name], strict=True))
        print(
            f"{name}: {without:,.0f} -> {with_it:,.0f} tokens/s, {spread}, first step {first:+.1f} s; {equal}",
            flush=True,
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
