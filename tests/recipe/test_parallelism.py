"""Keys that divide a model among processes pass through, typed by upstream's classes; pairs that exclude each other."""

import re
from pathlib import Path

import pytest

from trl_sft.errors import RecipeError
from trl_sft.recipe import build, engines, parallelism, processes
from trl_sft.recipe.upstream import fields

RECIPE = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\ntrain: {max_steps: 2}\n"


NEWER_KEYS = {"ep_size", "dp_replicate_size"} - set(
    fields.read_fields("transformers.distributed.configuration_utils:DistributedConfig")
)


def skip_newer_keys(text):
    """Skip a test of keys that the installed transformers does not have."""
    if newer := [key for key in sorted(NEWER_KEYS) if key in text and "distributed_config" in text]:
        pytest.skip(f"the installed transformers has no {newer[0]}")


def load(*overrides):
    Path("recipe.yaml").write_text(RECIPE)
    return build.load_run("recipe.yaml", overrides)


@pytest.mark.parametrize(
    ("override", "processes"),
    [
        ("train.parallelism_config={cp_size: 2, dp_shard_size: 4}", 8),
        ("train.parallelism_config={sp_size: 2, sp_backend: deepspeed, sp_handler: {sp_seq_length: 1024}}", 2),
        ("train.parallelism_config={cp_size: 2, cp_handler: {cp_comm_strategy: alltoall}}", 2),
        ("train.parallelism_config=null", 1),
    ],
)
def test_parallelism_of_accelerate_passes_through_with_its_keys(here, override, processes):
    run = load(override)
    assert parallelism.count_processes(parallelism.ACCELERATE, run.train.get("parallelism_config") or {}) == processes


def test_tensor_parallelism_of_both_keys_passes_through_with_one_size(here):
    loaded = ("model.distributed_config={tp_size: 2}", "train.save_strategy='no'")
    run = load("train.parallelism_config={tp_size: 2, tp_handler: {enable_async_tp: false}}", *loaded)
    assert parallelism.read_division(run.train, run.model, 2) == parallelism.Division(tensor=2)
    run = load("model.distributed_config={tp_plan: auto, fsdp_size: 2}", "train.save_strategy='no'")
    division = parallelism.read_division(run.train, run.model, 8)
    assert (division.tensor, division.count_row_groups(8)) == (4, 2)


@pytest.mark.parametrize(
    ("override", "multiple"),
    [("{cp_size: 4}", 8), ("{sp_size: 4}", 4), ("{dp_shard_size: 4}", None)],
)
def test_rows_that_processes_share_get_a_length_that_they_can_divide(here, override, multiple):
    run = load(f"train.parallelism_config={override}")
    setting = run.implied.get(("train", "pad_to_multiple_of"))
    assert (setting.value if setting else None) == multiple
    own = load(f"train.parallelism_config={override}", "train.pad_to_multiple_of=64")
    assert own.implied == {}


@pytest.mark.parametrize(("override", "engine"), [("{cp_size: 2}", "fsdp"), ("{sp_size: 2}", "zero3")])
def test_division_of_rows_chooses_its_engine(here, override, engine):
    assert engines.get_engine(load(f"train.parallelism_config={override}")) == engine


def test_processes_that_share_a_row_count_once_in_the_batch(here):
    run = load("train.parallelism_config={cp_size: 4, dp_shard_size: 2}", "run.global_batch_size=32")
    setting = processes.compute_settings(run, 8)["train", "gradient_accumulation_steps"]
    assert setting.value == 2
    assert setting.reason == "run.global_batch_size 32 = 8 a group x 2 groups of 4 processes x 2"


@pytest.mark.parametrize(
    ("mapping", "processes"),
    [
        ("{fsdp_size: 4, dp_replicate_size: 2}", 8),
        ("{tp_size: 2, tp_plan: auto}", 2),
        ("{tp_size: 2, fsdp_size: 2, ep_size: 4, ep_implementation: all_to_all}", 4),
        ("{pp_size: 2, tp_size: 2}", 4),
    ],
)
def test_parallelism_of_transformers_passes_through_with_its_keys(here, mapping, processes):
    skip_newer_keys(override := f"model.distributed_config={mapping}")
    run = load(override, "train.save_only_model=true")
    assert parallelism.count_processes(parallelism.TRANSFORMERS, run.model["distributed_config"]) == processes


FAULTS = {
    "train.parallelism_config={cp_sise: 2}": ("has no key `cp_sise`", "Did you mean `cp_size`"),
    "train.parallelism_config={cp_size: two}": ('the value is "two" (text)', "Write a whole number"),
    "train.parallelism_config={cp_size: 0}": ("the value is 0", "at least 1"),
    "train.parallelism_config={cp_size: 2, sp_size: 2}": ("exclude each other", "Remove one of the two."),
    "train.parallelism_config={cp_size: 2} train.packing=true": ("context parallelism drops it", "Remove one"),
    "train.parallelism_config={cp_size: 2} train.padding_free=true": ("context parallelism drops it", "Remove one"),
    "train.parallelism_config={cp_size: 4} train.pad_to_multiple_of=12": ("the value is 12", "Write a multiple of 8"),
    "train.parallelism_config={sp_size: 4} train.pad_to_multiple_of=6": ("the value is 6", "Write a multiple of 4"),
    "train.parallelism_config={cp_size: 2} model.attn_implementation=flash_attention_2": (
        "needs the attention sdpa, and the model has flash_attention_2",
        "Set `model.attn_implementation: sdpa`.",
    ),
    "train.parallelism_config={sp_size: 2, sp_handler: {sp_attn_implementation: flash_attention_2}}": (
        "`sp_handler` needs the attention flash_attention_2, and the model has sdpa, the default",
        "Set `model.attn_implementation: flash_attention_2`.",
    ),
    "train.parallelism_config={tp_size: 2}": ("divides no weight", "Set `model.distributed_config: {tp_size: 2}`."),
    "train.parallelism_config={tp_size: 4} model.distributed_config={tp_size: 2} train.save_strategy='no'": (
        "is 4, and that of `model.distributed_config` is 2",
        "Remove one of the two.",
    ),
    "train.parallelism_config={cp_size: 2} launch.engine=zero3": ("shards the model with FSDP2", "engine: fsdp"),
    "train.parallelism_config={sp_size: 2} launch.engine=fsdp": ("is DeepSpeed's", "engine: zero3"),
    "train.parallelism_config={sp_size: 2} train.loss_type=dft": ("which `loss_type` replaces", "Remove one"),
    "train.parallelism_config={tp_size: 2, dp_replicate_size: 2}": ("not sharded", "Set `dp_shard_size` above 1"),
    "train.parallelism_config={cp_handler: {cp_comm_strategy: alltoall}}": ("`cp_size` is 1", "Remove it."),
    "model.distributed_config={fsdp_size: 2}": ("cannot save the optimizer", "Set `train.save_only_model: true`"),
    "model.distributed_config={tp_size: 2} train.save_strategy='no' lora={r: 2}": ("whole layers", "Remove one"),
    "model.distributed_config={tp_siz: 2}": ("has no key `tp_siz`", "Did you mean `tp_size`"),
    "model.distributed_config={tp_plan: 3}": ("the value is", "Write"),
    "model.distributed_config={enable_sequence_parallel: true}": ("only reserves the name", "Remove it."),
    "model.distributed_config={fsdp_size: 2} train.save_strategy='no' launch.engine=fsdp": (
        "divides the weights at load time",
        "Remove one of the two.",
    ),
    "model.distributed_config={fsdp_size: 2, pp_size: 2} train.save_strategy='no'": ("pipeline", "Remove one"),
    "model.distributed_config={tp_size: 2, ep_size: 3} train.save_strategy='no'": ("`ep_size: 3`", "multiple"),
    "model.distributed_config={tp_size: 2} model.device_map=auto train.save_strategy='no'": ("`device_map`", "Remove"),
}


@pytest.mark.parametrize("words", FAULTS)
def test_pairs_that_exclude_each_other_are_told_with_the_recipe(here, words):
    skip_newer_keys(words)
    problem, fix = FAULTS[words]
    overrides = re.split(r" (?=(?:train|launch|model|lora)[.=])", words)
    with pytest.raises(RecipeError) as raised:
        load(*overrides)
    texts = [str(fault) for fault in raised.value.faults]
    assert any(problem in text and fix in text for text in texts), texts
