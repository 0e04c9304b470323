"""Which keys of a recipe may change between a checkpoint and the run that resumes from it.

Inputs: the values of two recipes, by dotted key. Outputs: the keys that differ, each with what the Trainer does with
it. The lists are closed: a key that none of them has, so also one that TRL adds later, may not change.
Not here: whether the prepared tokens changed (`tokenization.token_digest`).

What the Trainer does on resume was read from transformers 5.23, `Trainer._prepare_for_training` and `_load_*`: it
builds optimizer and schedule from the recipe, then loads their state. The state of the optimizer has the learning rate,
betas, epsilon and weight decay of each group, and that of the schedule has the initial learning rate; the function of
the schedule (its shape, warm-up, number of steps) is the recipe's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# Read anew in each step or at each event; nothing of them is in a checkpoint.
_LOGGING = frozenset(
    """
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm report_to run_name project
    trackio_space_id trackio_bucket_id trackio_static_space_id skip_memory_metrics debug
    """.split()
)
_EVALUATION = frozenset(
    """
    eval_strategy eval_steps eval_delay per_device_eval_batch_size eval_on_start eval_do_concat_batches
    eval_use_gather_object eval_accumulation_steps prediction_loss_only include_for_metrics batch_eval_metrics
    bf16_full_eval fp16_full_eval load_best_model_at_end do_train do_eval do_predict
    """.split()
)
_SAVING = frozenset(
    """
    save_only_model save_strategy save_steps save_on_each_node save_total_limit enable_jit_checkpoint
    push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision output_dir
    resume_from_checkpoint restore_callback_states_from_checkpoint
    """.split()
)
# They change speed or memory; the gradient is that of the same loss on the same rows.
_SPEED = frozenset(
    """
    gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing
    activation_checkpointing_kwargs activation_offloading torch_empty_cache_steps torch_compile
    torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config tf32 full_determinism
    dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor
    dataloader_multiprocessing_context dataloader_in_order dataset_num_proc ddp_find_unused_parameters
    ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout use_cpu use_cache
    pad_to_multiple_of
    """.split()
)
# The norm of the gradient is cut in each step, by the recipe's value.
_EACH_STEP = frozenset(["max_grad_norm"])
# The shape of the schedule is the recipe's; the first step still has the learning rate of the checkpoint.
SCHEDULE_KEYS = frozenset(
    ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio", "max_steps", "num_train_epochs")
)
# Rows are skipped by number of steps, so another number of rows in a step skips or repeats some.
BATCH_KEYS = frozenset(
    ("per_device_train_batch_size", "gradient_accumulation_steps", "auto_find_batch_size", "ignore_data_skip")
)
ALLOWED_TRAIN_KEYS = _LOGGING | _EVALUATION | _SAVING | _SPEED | _EACH_STEP | SCHEDULE_KEYS | BATCH_KEYS
# They decide what the prepared tokens are, which are compared by themselves.
DATA_TRAIN_KEYS = frozenset(
    """
    max_length truncation_mode shuffle_dataset packing packing_strategy eval_packing completion_only_loss
    assistant_only_loss chat_template_path dataset_text_field dataset_kwargs remove_unused_columns
    length_column_name label_names
    """.split()
)
# The checkpoint's value continues, whatever the recipe says.
CHECKPOINT_TRAIN_KEYS = frozenset(
    """
    learning_rate embedding_learning_rate weight_decay adam_beta1 adam_beta2 adam_epsilon optim_args
    """.split()
)
# schedules that follow the loss: their state in a checkpoint is not that of the others
LOSS_SCHEDULES = ("reduce_lr_on_plateau", "greedy")

EFFECT_NONE, EFFECT_BATCH, EFFECT_SCHEDULE, EFFECT_DATA = "none", "batch", "schedule", "data"
KEPT_BY_CHECKPOINT, REFUSED = "kept by the checkpoint", "refused"


class KeyChange(NamedTuple):
    """A key whose value differs from that of the run to resume."""

    key: str  # dotted: `train.optim`
    before: Any  # of the run to resume; None = not set
    now: Any
    effect: str  # one of the EFFECT words, KEPT_BY_CHECKPOINT, REFUSED

    def __str__(self) -> str:
        """Return the key with both values."""
        return f"{self.key}: {_word(self.before)} -> {_word(self.now)}"


def compare(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[KeyChange]:
    """Return the keys that differ between two recipes, in the order of the second.

    Args:
        before: value of each dotted key of the run to resume, as JSON has it.
        now: the same of this recipe.
    """
    names = [*now, *(name for name in before if name not in now)]
    differing = [name for name in names if before.get(name) != now.get(name)]
    groups_rows = "group_by_length" in (now.get("train.train_sampling_strategy"), now.get("train.group_by_length"))
    return [
        KeyChange(name, before.get(name), now.get(name), _classify(name, before, now, groups_rows=groups_rows))
        for name in differing
    ]


def _classify(name: str, before: Mapping[str, Any], now: Mapping[str, Any], *, groups_rows: bool) -> str:
    """Return what a changed key does to a run that resumes."""
    section, _, key = name.partition(".")
    if section == "data" or name in ("run.allow", "tokenizer.chat_template", "tokenizer.chat_template_kwargs"):
        return EFFECT_DATA
    if name == "run.global_batch_size" or (section == "train" and key in BATCH_KEYS):
        return REFUSED if groups_rows else EFFECT_BATCH  # rows are sorted within so many batches
    if name == "run.early_stopping":  # its count of evaluations goes on; the keys that it sets may change too
        return EFFECT_NONE
    if section != "train":
        return REFUSED
    if key == "lr_scheduler_type" and {before.get(name), now.get(name)} & set(LOSS_SCHEDULES):
        return REFUSED
    if key in SCHEDULE_KEYS:
        return EFFECT_SCHEDULE
    if key in DATA_TRAIN_KEYS:
        return EFFECT_DATA
    if key in CHECKPOINT_TRAIN_KEYS:
        return KEPT_BY_CHECKPOINT
    return EFFECT_NONE if key in ALLOWED_TRAIN_KEYS else REFUSED


def _word(value: Any) -> str:
    return "not set" if value is None else str(value)
