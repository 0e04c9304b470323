"""Trains eight steps with trl_sft's loss; each process writes its weights and losses. Tests start it with torchrun.

With the last word `1` the time is probed before step 1, and the estimate is written too.
"""

import contextlib
import sys
import types
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from trl_sft.model import cpu_loss, packed_attention
from trl_sft.training import time_probe

folder, model, batch, accumulation, packing = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
estimates = []
draw = torch.Generator().manual_seed(0)
rows = {"input_ids": [], "labels": []}
for _ in range(16):
    length = int(torch.randint(20, 60, (1,), generator=draw))
    ids = torch.randint(5, 500, (length,), generator=draw)
    rows["input_ids"].append(ids.tolist())
    rows["labels"].append([-100] * (length // 3) + ids[length // 3 :].tolist())
if packing:
    rows["seq_lengths"] = [[len(ids)] for ids in rows["input_ids"]]
args = SFTConfig(
    **{"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
    **{"max_steps": 8, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation},
    **{
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "packing": bool(packing),
        "max_length": 64,
        "logging_steps": 1,
    },
    **{"train_sampling_strategy": "sequential", "learning_rate": 1e-3, "optim": "sgd"},
)
trainer = SFTTrainer(
    AutoModelForCausalLM.from_pretrained(model),
    args=args,
    train_dataset=Dataset.from_dict(rows),
    processing_class=AutoTokenizer.from_pretrained(model),
)
assert cpu_loss.install(trainer.model, cpu_loss.LOGITS_GIB)
if packing:
    assert packed_attention.install(trainer.model)


class Probe(TrainerCallback):
    """Estimates the time before step 1, as `training.progress` does."""

    def on_train_begin(self, *_, **__):
        """Estimate, with a verification that counts nothing anyway."""
        measured = {"before_training": {"rows_per_micro_batch": batch}}
        verification = types.SimpleNamespace(measured=measured, paused=contextlib.nullcontext)
        estimates.append(time_probe.estimate_time(trainer, verification, price_per_hour=None))


if sys.argv[6:] == ["1"]:
    time_probe._MIN_STEPS = 1
    trainer.add_callback(Probe())
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
seconds = [(estimate.low, estimate.seconds, estimate.high) for estimate in estimates]
torch.save([trainer.model.state_dict(), losses, seconds], folder / f"rank{args.process_index}-of-{args.world_size}.pt")
