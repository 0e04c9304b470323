"""Memory of one process where an engine divides a step among several.

In: the estimate of the whole step on one device, the engine of the recipe, the number of processes. Out: the estimate
for one process. The rules are those of the engines' own documentation; no engine is run for them:

- DDP keeps everything on each process, and a second copy of the gradients in its buckets (torch,
  `DistributedDataParallel`; `gradient_as_bucket_view` is off).
- ZeRO divides the optimizer's state (1), also the gradients (2), also the weights (3). With bf16 or fp16 it keeps
  weights and gradients in 16 bits, and float32 weights with the optimizer's state (arXiv:1910.02054, section 3).
- FSDP2 divides weights, gradients and optimizer state.
- Divided weights are gathered for a while: two layers at a time, and embedding and head, which stay.

Deliberately absent: buffers of NCCL and of DeepSpeed, and what an allocator loses.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from trl import SFTConfig

from trl_sft.recipe import engines
from trl_sft.recipe.checked import Run
from trl_sft.training.memory.estimate import Estimate

_STATES_OF_ADAM = 8  # bytes of each trained element


def divide(estimate: Estimate, run: Run, args: SFTConfig, *, config: PretrainedConfig, processes: int) -> Estimate:
    """Return the bytes of one process.

    Args:
        estimate: of the whole step on one device.
        run: the checked recipe.
        args: the live settings.
        config: of the model, for its number of layers.
        processes: how many train together; with 1 the estimate is returned as it is.

    """
    if processes == 1:
        return estimate
    engine = engines.get_engine(run)
    weights, gradients, optimizer = estimate.weights, estimate.gradients, estimate.optimizer
    stage = engines.STAGES.get(engine, 3 if engine == engines.FSDP else 0)
    if engine in engines.STAGES and (args.bf16 or args.fp16):
        weights, gradients, optimizer = _in_16_bits(estimate, run)
    gathered = 0
    if stage == 0:
        gathered = gradients  # the buckets
    if stage >= 1:
        optimizer = math.ceil(optimizer / processes)
    if stage >= 2:
        gradients = math.ceil(gradients / processes)
    if stage == 3:
        gathered = _count_gathered(weights, config)
        weights = math.ceil(weights / processes)
    weights, gradients, optimizer = _offload(run, weights, gradients, optimizer=optimizer)
    saved = estimate.minimum - (weights + gradients + optimizer)
    peak = max(estimate.peak - saved, weights + gradients + optimizer + estimate.activations + estimate.logits)
    return estimate._replace(weights=weights, gradients=gradients, optimizer=optimizer, peak=peak + gathered)


def describe(run: Run, processes: int) -> str:
    """Return what the estimate of one process is of; "" for one process."""
    return (
        "" if processes == 1 else f"for each of {processes} processes under {engines.get_engine(run)}, not measured: "
    )


def _in_16_bits(estimate: Estimate, run: Run) -> tuple[int, int, int]:
    """Return weights, gradients and optimizer state as DeepSpeed keeps them under mixed precision."""
    size = 4 if run.model.get("dtype", "float32") == "float32" or run.lora is not None else 2
    trained = estimate.gradients // size  # elements
    weights = estimate.weights - trained * (size - 2)
    return weights, trained * 2, max(estimate.optimizer, trained * _STATES_OF_ADAM) + trained * 4


def _count_gathered(weights: int, config: PretrainedConfig) -> int:
    """Return the bytes of weights that a process gathers at once: two layers, embedding and head."""
    text = config.get_text_config()
    layers = max(1, int(getattr(text, "num_hidden_layers", 1)))
    elements = int(text.vocab_size) * int(text.hidden_size) * (1 if text.tie_word_embeddings else 2)
    outside = min(elements * 2, weights)  # in 16 bits, as they are computed
    return outside + 2 * (weights - outside) // layers


def _offload(run: Run, weights: int, gradients: int, *, optimizer: int) -> tuple[int, int, int]:
    """Return the bytes that stay on the card where `launch.config` moves the others to the processor's memory."""
    config = engines.read_config(run)
    zero: dict[str, Any] = config.get("zero_optimization") or {}
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        optimizer = 0
    if (zero.get("offload_param") or {}).get("device", "none") != "none":
        weights = 0
    if any(config.get(name) for name in ("cpu_offload", "fsdp_offload_params", "offload_params")):
        weights = gradients = optimizer = 0
    return weights, gradients, optimizer
