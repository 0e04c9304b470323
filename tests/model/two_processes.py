"""Trains eight steps with trl_sft's loss; each process writes its weights and losses. Tests start it with torchrun."""

import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from trl_sft.model import cpu_loss, packed_attention

folder, model, batch, accumulation, packing = Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:6])
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
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
torch.save([trainer.model.state_dict(), losses], folder / f"rank{args.process_index}-of-{args.world_size}.pt")
