"""Memory that DeepSpeed's ZeRO takes beside the shares of weights, gradients and optimizer state.

In: the configuration of the engine, the trained elements of the model, the number of processes. Out: bytes that live in
the backward pass and at the update. The rules are those of the source of DeepSpeed 0.19.8, `runtime/zero`:

- A bucket of `reduce_bucket_size` elements (500 million by default) for the gradients that are reduced together: stages
  1 and 2 allocate it in the backward pass, twice with `overlap_comm` (`stage_1_and_2.py`, `setup_buckets`), stage 3
  once, for the whole run (`stage3.py`, `_setup_for_real_optimizer`).
- The whole gradient of a parameter, before it is copied into the bucket. The embedding is taken as the largest.
- Stage 2 adds the gradients of a batch to those of the batches before it in a second copy of its share
  (`independent_gradient_partition_epilogue`).
- Stage 3 copies a bucket to scatter it (`runtime/comm/coalesced_collectives.py`, `reduce_scatter_coalesced`).
- At the update the share of the gradients is copied to float32: all of it (stages 1 and 2, `step`), or
  `sub_group_size` elements at a time (stage 3, `_prepare_fp32_grad_for_sub_group`).

Deliberately absent: weights that stage 3 gathers (`sharding`), and buffers of NCCL.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from transformers import PretrainedConfig

_BUCKET = 500_000_000  # DeepSpeed's defaults, in elements (`DeepSpeedZeroConfig`)
_SUB_GROUP = 1_000_000_000
_MASTER = 4  # bytes of an element of float32


class ZeroBuffers(NamedTuple):
    """Bytes beside the shares of weights, gradients and optimizer state."""

    backward: int  # in the backward pass
    update: int  # at the update of the weights


def count(
    zero: dict[str, Any],
    config: PretrainedConfig,
    *,
    trained: int,
    size: int,
    shards: int,
    accumulates: bool,
) -> ZeroBuffers:
    """Return the bytes that ZeRO takes beside what it divides.

    Args:
        zero: The section `zero_optimization` of DeepSpeed's configuration, with its stage.
        config: Of the model.
        trained: Elements that are trained.
        size: Bytes of an element of weights and gradients.
        shards: Among how many processes.
        accumulates: Whether a step has several batches.

    """
    stage, bucket = zero["stage"], _get_bucket(zero, config)
    buffer = bucket if zero.get("contiguous_gradients", True) else min(bucket, trained)
    text = config.get_text_config()
    largest = min(trained, int(text.vocab_size) * int(text.hidden_size))
    share = -(-trained // shards)
    if stage == 3:
        kept = buffer * size
        backward = kept + (largest + min(trained, max(bucket, largest))) * size
        group = min(share, int(float(zero.get("sub_group_size", _SUB_GROUP))))
        update = kept + group * _count_copies(size)
    else:
        backward = buffer * size * (2 if zero.get("overlap_comm") else 1)
        if stage == 2:
            backward += (largest + (share if accumulates else 0)) * size
        whole = trained if stage == 1 else share  # what counts as gradients: stage 1 keeps no more than its share then
        update = max(0, share * (size + _count_copies(size)) - whole * size)
    if (zero.get("offload_optimizer") or {}).get("device", "none") != "none":
        update = 0  # the float32 copy lies where the optimizer is
    return ZeroBuffers(backward, update)


def _count_copies(size: int) -> int:
    """Return the bytes of an element while gradients become float32: flat, then float32 where it is not yet."""
    return size if size == _MASTER else size + _MASTER


def _get_bucket(zero: dict[str, Any], config: PretrainedConfig) -> int:
    """Return the elements of a bucket; transformers makes `auto` the square of the hidden size.

    `HfTrainerDeepSpeedConfig.trainer_config_finalize`, for each stage.
    """
    value = zero.get("reduce_bucket_size", _BUCKET)
    return int(config.get_text_config().hidden_size) ** 2 if value == "auto" else int(float(value))
