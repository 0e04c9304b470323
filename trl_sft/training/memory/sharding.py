"""Memory of one process where an engine divides a step among several.

In: the estimate of the whole step on one device, the engine of the recipe, the number of processes. Out: the estimate
for one process. The rules are those of the engines' own documentation; no engine is run for them:

- DDP keeps everything on each process, and a second copy of the gradients in its buckets (torch,
  `DistributedDataParallel`; `gradient_as_bucket_view` is off).
- ZeRO divides the optimizer's state (1), also the gradients (2), also the weights (3). With bf16 or fp16 it keeps
  weights and gradients in 16 bits (arXiv:1910.02054, section 3). The optimizer has a float32 copy of the weights in any
  precision: DeepSpeed 0.19.8 clones its share (`stage_1_and_2.py`; `stage3.py`, `_create_fp32_partitions`, where the
  check for an equal device compares a device with its name). What it takes besides: `zero_buffers`.
- FSDP2 divides weights, gradients and optimizer state. Under mixed precision accelerate makes the trained weights
  float32. `dp_replicate_size` keeps so many copies.
- Context and sequence parallelism divide the tokens of a row: the step is estimated with a row of that length, and
  attention exchanges keys and values (`_count_exchanged`). The processes that share a row also share the weights.
- Tensor and pipeline parallelism divide the layers. Their activations are counted whole.
- Divided weights are gathered for a while: two layers at a time, and embedding and head, which stay. ZeRO-3 also keeps
  what it uses again within `stage3_max_reuse_distance` elements (`partitioned_param_coordinator.py`,
  `__params_to_release`): the last weights of the forward pass, as many as half of that.

Deliberately absent: buffers of NCCL, and what an allocator loses.
"""

from __future__ import annotations

import math
from typing import Any

from transformers import PretrainedConfig
from trl import SFTConfig

from trl_sft.recipe import engines, parallelism
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import zero_buffers
from trl_sft.training.memory.estimate import Estimate
from trl_sft.training.memory.fake_model import Batch

_STATES_OF_ADAM = 8  # bytes of each trained element
_REUSE_DISTANCE = 1_000_000_000  # elements: DeepSpeed's default


def divide_batch(batch: Batch, run: Run, processes: int) -> Batch:
    """Return the part of a batch that one process computes, where several share each row.

    Args:
        batch: The rows of a group of processes.
        run: The checked recipe.
        processes: How many train together.

    """
    parts = parallelism.read_division(run.train, run.model, processes).sequence if processes > 1 else 1
    if parts == 1:
        return batch
    tokens = math.ceil(batch.tokens / parts)
    documents = tuple(math.ceil(document / parts) for document in batch.documents)
    labelled = min(batch.labelled, batch.rows * tokens)  # all of them may lie on one process
    return batch._replace(tokens=tokens, labelled=labelled, documents=documents, padded=False)


def divide(
    estimate: Estimate, run: Run, args: SFTConfig, *, config: PretrainedConfig, batch: Batch, processes: int
) -> Estimate:
    """Return the bytes of one process.

    Args:
        estimate: of the whole model on one device, with the part of the batch that one process computes.
        run: the checked recipe.
        args: the live settings.
        config: of the model, for its number of layers.
        batch: the rows of a group of processes, whole.
        processes: how many train together; with 1 the estimate is returned as it is.

    """
    if processes == 1:
        return estimate
    division = parallelism.read_division(run.train, run.model, processes)
    at_load = parallelism.find_engine_at_load(run.model)
    engine = at_load if at_load == engines.FSDP else engines.get_engine(run)
    weights, gradients, optimizer = estimate.weights, estimate.gradients, estimate.optimizer
    stage = engines.STAGES.get(engine, 3 if engine == engines.FSDP else 0)
    is_mixed = bool(args.bf16 or args.fp16)
    computed = _in_deepspeed(estimate, run, is_mixed=is_mixed)[0]  # what is gathered
    if engine in engines.STAGES:
        weights, gradients, optimizer = _in_deepspeed(estimate, run, is_mixed=is_mixed)
    elif engine == engines.FSDP and is_mixed and not at_load:
        weights, gradients, optimizer = _in_32_bits(estimate, run)
    shards = processes // (division.replicas if engine == engines.FSDP else 1)
    gathered = 0
    if stage == 0 and at_load:
        share = min(1.0, _count_outside(config) * _get_weight_bytes(run) / max(weights, 1))
        parts = [_divide_layers(part, share, division) for part in (weights, gradients, optimizer)]
        weights, gradients, optimizer = parts
    elif stage == 0:
        gathered = gradients  # the buckets
    if stage >= 1:
        optimizer = math.ceil(optimizer / shards)
    if stage >= 2:
        gradients = math.ceil(gradients / shards)
    if stage == 3:
        size = 2 if is_mixed else _get_weight_bytes(run)
        gathered = max(_count_gathered(computed, config, size=size), _count_reused(run, computed, size=size))
        weights = math.ceil(weights / shards)
    weights, gradients, optimizer = _offload(run, weights, gradients, optimizer=optimizer)
    minimum = weights + gradients + optimizer
    peak = max(estimate.peak - estimate.minimum + minimum, minimum + estimate.activations + estimate.logits)
    exchanged = _count_exchanged(run, config, batch, parts=division.sequence, size=2 if is_mixed else 4)
    own = count_zero_buffers(estimate, run, args, config=config, shards=shards)
    in_pass = gathered + exchanged + own.backward
    peak, buffers = max(peak + in_pass, minimum + own.update), max(in_pass, own.update)
    return estimate._replace(weights=weights, gradients=gradients, optimizer=optimizer, peak=peak, buffers=buffers)


def describe(run: Run, processes: int) -> str:
    """Return what the estimate of one process is of; "" for one process."""
    if processes == 1:
        return ""
    at_load = parallelism.find_engine_at_load(run.model)
    engine = engines.get_engine(run) if at_load is None else parallelism.NAMES[at_load]
    return f"for each of {processes} processes under {engine}, not measured: "


def _in_deepspeed(estimate: Estimate, run: Run, *, is_mixed: bool) -> tuple[int, int, int]:
    """Return weights, gradients and optimizer state as DeepSpeed keeps them."""
    size = _get_trained_bytes(run)
    trained = estimate.gradients // size  # elements
    own = 2 if is_mixed else size
    weights = estimate.weights - trained * (size - own)
    return weights, trained * own, max(estimate.optimizer, trained * _STATES_OF_ADAM) + trained * 4


def count_zero_buffers(
    estimate: Estimate, run: Run, args: SFTConfig, *, config: PretrainedConfig, shards: int
) -> zero_buffers.ZeroBuffers:
    """Return the bytes that ZeRO takes beside the shares; nothing under another engine.

    Args:
        estimate: of the whole model on one device.
        run: the checked recipe.
        args: the live settings.
        config: of the model.
        shards: among how many processes a part is divided.

    """
    stage = engines.STAGES.get(engines.get_engine(run))
    if stage is None:
        return zero_buffers.ZeroBuffers(0, 0)
    size = _get_trained_bytes(run)
    return zero_buffers.count(
        (engines.read_config(run).get("zero_optimization") or {}) | {"stage": stage},
        config,
        trained=estimate.gradients // size,
        size=2 if args.bf16 or args.fp16 else size,
        shards=shards,
        accumulates=args.gradient_accumulation_steps > 1,
    )


def _get_trained_bytes(run: Run) -> int:
    """Return the bytes of an element that is trained, as the recipe loads it: adapters are float32."""
    return 4 if run.lora is not None else _get_weight_bytes(run)


def _get_weight_bytes(run: Run) -> int:
    """Return the bytes of an element of the weights, as the recipe loads them."""
    return 4 if run.model.get("dtype", "float32") == "float32" else 2


def _in_32_bits(estimate: Estimate, run: Run) -> tuple[int, int, int]:
    """Return weights, gradients and optimizer state under FSDP2, for which accelerate makes trained weights float32.

    accelerate 1.12 to 1.15, `fsdp2_prepare_model`, under mixed precision.
    """
    if run.lora is not None or _get_weight_bytes(run) == 4:
        return estimate.weights, estimate.gradients, estimate.optimizer
    trained = estimate.gradients // 2  # elements
    return estimate.weights + trained * 2, trained * 4, estimate.optimizer * 2


def _divide_layers(part: int, share: float, division: parallelism.Division) -> int:
    """Return the bytes of a process where `distributed_config` divides the layers, and not embedding and head.

    Args:
        part: Bytes of weights, gradients or optimizer state.
        share: Of embedding and head in the weights, 0 to 1: a model's plan may leave them whole.
        division: Among how many processes the layers are divided.

    """
    outside = round(part * share)
    return outside + math.ceil((part - outside) / (division.tensor * division.pipeline))


def _count_exchanged(run: Run, config: PretrainedConfig, batch: Batch, *, parts: int, size: int) -> int:
    """Return the bytes of what the processes that share a row exchange for the attention of one layer.

    Context parallelism gathers the keys and values of the whole row, or passes those of a part on
    (`cp_comm_strategy`; torch 2.8 to 2.13, `_AllGatherRotater`). DeepSpeed's sequence parallelism exchanges queries,
    keys, values and outputs of as many tokens as a process has (arXiv:2309.14509, section 3.2), and repeats keys and
    values where there are fewer heads of them than processes.

    Args:
        run: The checked recipe.
        config: Of the model, for its attention.
        batch: The whole rows.
        parts: How many processes share a row.
        size: Bytes of a number.

    """
    if parts == 1:
        return 0
    text = config.get_text_config()
    heads = int(text.num_attention_heads)
    key_heads = int(getattr(text, "num_key_value_heads", None) or heads)
    width = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    row = batch.rows * batch.tokens * width * size  # bytes of one head
    mapping = run.train[parallelism.ACCELERATE_NAME]
    if (mapping.get("sp_size") or 1) > 1:
        return row * 2 * (heads + max(key_heads, parts)) // parts
    strategy = (mapping.get("cp_handler") or {}).get("cp_comm_strategy") or "allgather"
    return row * 2 * key_heads if strategy == "allgather" else row * 4 * key_heads // parts


def _count_gathered(weights: int, config: PretrainedConfig, *, size: int) -> int:
    """Return the bytes of weights that a process gathers at once: two layers, embedding and head.

    Args:
        weights: Bytes of all of them, as they are computed.
        config: Of the model.
        size: Bytes of an element of embedding and head.

    """
    layers = max(1, int(getattr(config.get_text_config(), "num_hidden_layers", 1)))
    outside = min(_count_outside(config) * size, weights)
    return outside + 2 * (weights - outside) // layers


def _count_reused(run: Run, weights: int, *, size: int) -> int:
    """Return the bytes of the weights that ZeRO-3 keeps gathered from the forward to the backward pass."""
    if engines.get_engine(run) not in engines.STAGES:
        return 0
    zero = engines.read_config(run).get("zero_optimization") or {}
    distance = zero.get("stage3_max_reuse_distance", zero.get("max_reuse_distance", _REUSE_DISTANCE))
    return min(weights, int(float(distance)) // 2 * size)


def _count_outside(config: PretrainedConfig) -> int:
    """Return the elements of embedding and head, which no layer holds."""
    text = config.get_text_config()
    return int(text.vocab_size) * int(text.hidden_size) * (1 if text.tie_word_embeddings else 2)


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
