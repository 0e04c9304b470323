"""Counts the bytes of weights, gradients and optimizer state that live on a process when its optimizer steps.

`sharded_run` imports it where the environment variable MEMORY_FILE names a file; each process adds a line of JSON. The
second step counts: the optimizer's state exists then. Tensors of Python alone are seen: buckets of DDP are not.
"""

import gc
import json
import os
from pathlib import Path

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from trl_sft import ranks
from trl_sft.training import run as runs

_MASTERS = ("single_partition_of_fp32_groups", "fp32_partitioned_groups_flat")  # of DeepSpeed's optimizers
trainers, largest, backward = [], {}, {}


def keep_trainer(*arguments):
    trainer = build_trainer(*arguments)
    trainers.append(trainer)
    if trainer.args.deepspeed:  # the embedding is the last to get its gradient
        trainer.model.get_input_embeddings().weight.register_post_accumulate_grad_hook(measure_backward)
        for module in trainer.model.modules():
            module.register_forward_hook(measure_gathered)
        _scatter_before_measured()
    return trainer


def _scatter_before_measured():
    """Count also where ZeRO-3 has copied a bucket to scatter it."""
    from deepspeed.runtime.comm import coalesced_collectives

    scatter = coalesced_collectives._torch_reduce_scatter_fn

    def measure_and_scatter(*arguments, **keywords):
        measure_backward(None)
        return scatter(*arguments, **keywords)

    coalesced_collectives._torch_reduce_scatter_fn = measure_and_scatter


def measure_gathered(*_):
    """Keep the most bytes of weights that ZeRO-3 has gathered after a module."""
    parameters = list(trainers[-1].model.parameters())
    if hasattr(parameters[0], "ds_status"):
        gathered = sum(p.data.numel() * p.data.element_size() for p in parameters if p.data.numel() == p.ds_numel)
        backward["gathered"] = max(gathered, backward.get("gathered", 0))


def measure_backward(_):
    """Count gradients and buffers of DeepSpeed in the backward pass, and keep the most."""
    seen = set()
    engine_parts = [getattr(trainers[-1].model_wrapped.optimizer, name, []) for name in _MASTERS]
    count([*trainers[-1].model.parameters(), *(tensor for part in engine_parts for tensor in part)], seen)
    gradients = count((p.grad for p in trainers[-1].model.parameters() if p.grad is not None), seen)
    states = [v for s in trainers[-1].optimizer.state.values() for v in s.values() if torch.is_tensor(v)]
    count(states, seen)
    others = sorted(((count([t], seen), tuple(t.shape), str(t.dtype)) for t in list_tensors()), reverse=True)
    total = sum(size for size, _, _ in others)
    if gradients + total > backward.get("gradients", 0) + backward.get("others", 0):
        backward.update(gradients=gradients, others=total, largest=others[:4])


def list_tensors():
    return [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and t.device.type != "meta"]


def unwrap(tensor):
    tensor = getattr(tensor, "ds_tensor", tensor).detach()
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def count(tensors, seen):
    """Return the bytes of the storages that were not counted before."""
    total = 0
    for tensor in tensors:
        storage = unwrap(tensor).untyped_storage()
        if storage.data_ptr() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            total += storage.nbytes()
    return total


def measure(optimizer, _, __):
    """Count what lives now; keep the most of the second step or later."""
    if not any(optimizer.state.values()):
        return
    trainer, seen = trainers[-1], set()
    deepspeed = getattr(trainer.model_wrapped, "optimizer", None)
    masters = [tensor for name in _MASTERS for tensor in getattr(deepspeed, name, [])]
    parameters = [*trainer.model.parameters(), *trainer.model.buffers()]
    stepped = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = {
        "weights": parameters,
        "optimizer": [
            *masters,
            *(v for state in optimizer.state.values() for v in state.values() if torch.is_tensor(v)),
        ],
        "gradients": [p.grad for p in (*parameters, *stepped, *masters) if p.grad is not None],
    }
    parts = {name: count(part, seen) for name, part in tensors.items()}
    sizes = sorted(((count([t], seen), tuple(t.shape), str(t.dtype)) for t in list_tensors()), reverse=True)
    parts["others"] = sum(size for size, _, _ in sizes)
    parts["largest_others"] = [size for size in sizes[:6] if size[0] > 2**20]
    if sum(v for v in parts.values() if isinstance(v, int)) > sum(v for v in largest.values() if isinstance(v, int)):
        largest.update(parts)


def write():
    with Path(os.environ["MEMORY_FILE"]).open("a") as file:
        file.write(json.dumps({"rank": ranks.get_number(), **largest, "backward": backward}) + "\n")


build_trainer = runs.build_trainer
runs.build_trainer = keep_trainer
register_optimizer_step_pre_hook(measure)
