"""Which keys may change when a run resumes: closed lists, and what a change of each kind does."""

import dataclasses

import pytest
from trl import SFTConfig

from trl_sft.recipe import resume_keys, sections
from trl_sft.recipe.resume_keys import KeyChange, compare

# The state in the checkpoint does not fit, or the weights would be of two runs: optimizer, precision, objective, order.
REFUSED = frozenset(
    """
    optim optim_target_modules bf16 fp16 average_tokens_across_devices label_smoothing_factor
    neftune_noise_alpha loss_type router_aux_loss_coef padding_free eos_token pad_token seed data_seed
    train_sampling_strategy dataloader_drop_last metric_for_best_model greater_is_better accelerator_config
    parallelism_config distributed_config fsdp fsdp_config deepspeed local_rank model_init_kwargs
    trust_remote_code
    """.split()
)
LISTS = {
    "allowed": resume_keys.ALLOWED_TRAIN_KEYS,
    "data": resume_keys.DATA_TRAIN_KEYS,
    "checkpoint": resume_keys.CHECKPOINT_TRAIN_KEYS,
    "refused": REFUSED,
}


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(SFTConfig)])
def test_every_field_of_sftconfig_stands_in_exactly_one_list(field):
    assert [name for name, keys in LISTS.items() if field in keys] != []
    assert sum(field in keys for keys in LISTS.values()) == 1


def effect(key, before, now, **others):
    """Return the effect of a changed key."""
    (change,) = compare(others | {key: before}, others | {key: now})
    assert (change.key, change.before, change.now) == (key, before, now)
    return change.effect


@pytest.mark.parametrize("key", ["train.a_field_of_a_later_trl", "model.dtype", "lora.r", "quantization.load_in_4bit"])
def test_key_that_no_list_has_is_refused(key):
    assert effect(key, 1, 2) == resume_keys.REFUSED


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("train.logging_steps", resume_keys.EFFECT_NONE),
        ("train.max_grad_norm", resume_keys.EFFECT_NONE),
        ("train.gradient_checkpointing", resume_keys.EFFECT_NONE),
        ("train.max_steps", resume_keys.EFFECT_SCHEDULE),
        ("train.lr_scheduler_type", resume_keys.EFFECT_SCHEDULE),
        ("train.per_device_train_batch_size", resume_keys.EFFECT_BATCH),
        ("run.global_batch_size", resume_keys.EFFECT_BATCH),
        ("train.packing", resume_keys.EFFECT_DATA),
        ("data.eval_fraction", resume_keys.EFFECT_DATA),
        ("tokenizer.chat_template", resume_keys.EFFECT_DATA),
        ("tokenizer.padding_side", resume_keys.REFUSED),
        ("train.learning_rate", resume_keys.KEPT_BY_CHECKPOINT),
        ("train.optim", resume_keys.REFUSED),
        ("train.seed", resume_keys.REFUSED),
        ("lora", resume_keys.REFUSED),
    ],
)
def test_effect_of_a_changed_key(key, expected):
    assert effect(key, "a", "b") == expected


def test_batch_size_is_refused_where_rows_are_grouped_by_length():
    grouped = {"train.train_sampling_strategy": "group_by_length"}
    assert effect("train.per_device_train_batch_size", 2, 4, **grouped) == resume_keys.REFUSED


def test_schedule_with_a_state_of_its_own_is_refused():
    assert effect("train.lr_scheduler_type", "linear", "reduce_lr_on_plateau") == resume_keys.REFUSED
    assert effect("train.lr_scheduler_type", "greedy", "linear") == resume_keys.REFUSED


def test_equal_values_are_no_change_and_a_removed_key_is_one():
    assert compare({"train.seed": 1}, {"train.seed": 1}) == []
    assert compare({"train.logging_steps": 1}, {}) == [
        KeyChange("train.logging_steps", 1, None, resume_keys.EFFECT_NONE)
    ]
    assert str(compare({}, {"lora.r": 8})[0]) == "lora.r: not set -> 8"


def test_own_keys_of_data_are_decided_by_the_tokens():
    own = [f"data.{key}" for key in sections.OWN_KEYS["data"]]
    assert all(effect(key, 1, 2) == resume_keys.EFFECT_DATA for key in own)
