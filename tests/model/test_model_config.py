"""`model.config` sets fields of the model's configuration: checked by its class, the same in every part of a run."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

from trl_sft import cli
from trl_sft.errors import LaunchError, RecipeError
from trl_sft.model import load, meta_model, parallelism
from trl_sft.recipe import build, paths
from trl_sft.training import stages

RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: rows.jsonl}
train: {output_dir: out, max_steps: 2, per_device_train_batch_size: 2, save_strategy: 'no', learning_rate: 1e-2}
evaluate: false
"""
YARN = "{rope_type: yarn, factor: 4.0, rope_theta: 10000.0, original_max_position_embeddings: 1024}"


def load_run(*overrides):
    Path("recipe.yaml").write_text(RECIPE)
    return build.load_run("recipe.yaml", overrides)


def test_fields_reach_the_model_that_trains_and_the_folder_that_is_saved(go):
    word = f"model.config={{rope_parameters: {YARN}, attention_dropout: 0.1}}"
    code, _, err = go(RECIPE, word, "train.use_cpu=true")
    assert code == 0, err
    saved = json.loads(Path("out/config.json").read_text())
    assert saved["rope_parameters"]["rope_type"] == "yarn"
    assert saved["attention_dropout"] == 0.1
    model = AutoModelForCausalLM.from_pretrained("out")
    assert model.model.rotary_emb.rope_type == "yarn"
    record = json.loads(Path("out/run.json").read_text())
    assert record["recipe"]["model.config"]["attention_dropout"] == 0.1
    assert "rope_type: yarn" in Path("out/resolved.yaml").read_text()


def test_adapter_is_loaded_on_a_base_with_the_same_fields(go):
    from trl_sft.serving import model_folder, model_loading

    code, _, err = go(RECIPE, f"model.config={{rope_parameters: {YARN}}}", "lora={r: 2}")
    assert code == 0, err
    source = model_folder.find_model(Path("out"))
    tokenizer = model_loading.load_tokenizer(source, trusts_code=False)
    model = model_loading.load_model(source, tokenizer, trusts_code=False)
    assert model.get_base_model().model.rotary_emb.rope_type == "yarn"
    assert cli.main(["merge", "out", "-o", "merged"]) == 0
    merged = AutoModelForCausalLM.from_pretrained("merged", dtype=torch.float32)
    assert merged.config.rope_parameters["rope_type"] == "yarn"
    rows = torch.arange(3, 60)[None]
    bare = AutoPeftModelForCausalLM.from_pretrained("out", dtype=torch.float32)(rows).logits
    usage = "model = " + Path("out/README.md").read_text().partition("model = ")[2].partition("\n")[0]
    usage = usage.removeprefix("model = ").replace("(folder", '("out"')
    as_the_card_says = eval(usage, {"AutoPeftModelForCausalLM": AutoPeftModelForCausalLM})(rows).logits
    logits = model(rows).logits
    assert torch.equal(as_the_card_says, logits)
    difference = (merged(rows).logits - logits).abs().max()
    assert difference < 0.2  # the merged weights are rounded to the dtype of the base
    assert (bare - logits).abs().max() > 5 * difference


def test_configuration_and_model_without_weights_have_the_fields(here):
    run = load_run(f"model.config={{rope_parameters: {YARN}, max_position_embeddings: 4096}}")
    source = load.find_model(run)
    upstream = transformers.AutoConfig.from_pretrained(
        paths.EMBEDDED / "tiny", rope_parameters=dict(source.config.rope_parameters), max_position_embeddings=4096
    )
    assert source.config.to_dict() == upstream.to_dict()
    assert meta_model.build(run, source).config.max_position_embeddings == 4096


FAULTS = {
    "{atention_dropout: 0.1}": ("LlamaConfig has no field `atention_dropout`", "Did you mean `attention_dropout`?"),
    "{attention_dropout: often}": ('LlamaConfig does not take "often" (text)', "which the model has"),
    "{dtype: bfloat16}": ("`dtype` cannot be set here", "Use `model.dtype`."),
    "{rope_scaling: {rope_type: linear, factor: 2}}": ("cannot be set here", "Use `rope_parameters`"),
    "{rope_parameters: yarn}": ('the value is "yarn" (text)', "Write a mapping"),
    "{rope_parameters: {rope_type: yarn, factor: 4}}": ("has no `rope_theta`", "Add `rope_theta: 10000.0`, which the"),
    "{rope_parameters: {rope_type: yarm, factor: 4, rope_theta: 1e4}}": ("no `rope_type`", "Did you mean `yarn`?"),
    "{rope_parameters: {rope_type: linear, rope_theta: 1e4}}": ("needs `factor`", "Add `factor`."),
    "{rope_parameters: {rope_type: linear, rope_theta: 1e4, factr: 2}}": ("no `factr`", "Did you mean `factor`?"),
    "{rope_parameters: {rope_type: linear, rope_theta: 1e4, factor: two}}": ('"two" (text)', "Write a number."),
}


@pytest.mark.parametrize("mapping", FAULTS)
def test_field_that_the_class_does_not_take_is_refused_before_the_weights_load(here, mapping):
    problem, fix = FAULTS[mapping]
    with pytest.raises(RecipeError) as raised:
        load.find_model(load_run(f"model.config={mapping}"))
    texts = [str(fault) for fault in raised.value.faults]
    assert any(problem in text and fix in text for text in texts), texts


SHAPES = {
    "{intermediate_size: 100}": r"mlp.down_proj.weight has the shape \(64, 192\) in its files and \(64, 100\)",
    "{attention_dropout: 0.1, hidden_size: 32}": r"has the shape .* `hidden_size` of `model.config` changes the",
    "{vocab_size: 900}": r"embed_tokens.weight has the shape \(\d+, 64\) in its files and \(900, 64\) in the model;",
    "{num_hidden_layers: 1}": r"in its files and not in the model .* `num_hidden_layers` of `model.config` changes",
    "{attention_bias: true, num_key_value_heads: 2}": r"`attention_bias`, `num_key_value_heads` of `model.config`",
}


@pytest.mark.parametrize("mapping", SHAPES)
def test_field_that_changes_the_shape_of_weights_is_refused_by_name(here, mapping):
    run = load_run(f"model.config={mapping}")
    with pytest.raises(RecipeError, match=SHAPES[mapping]) as raised:
        stages.check_model(run, load.find_model(run))
    removed = [edit.key for fault in raised.value.faults for edit in fault.edits]
    assert removed
    assert all(key[:2] == ("model", "config") for key in removed)
    assert ("model", "config", "attention_dropout") not in removed


def test_another_number_of_processes_than_the_recipe_divides_is_refused(here):
    run = load_run("train.parallelism_config={cp_size: 2}")
    with pytest.raises(LaunchError, match="cp_size: 2 need 2 processes, and 1 trains"):
        stages.settle_settings(run)
    assert stages.settle_settings(run, elsewhere=True, processes=2).args.parallelism_config.cp_size == 2
    run = load_run("train.parallelism_config={sp_size: 2}")
    with pytest.raises(LaunchError, match="sp_size: 2 need 2 processes, and 4 train"):
        stages.settle_settings(run, elsewhere=True, processes=4)
    run = load_run("model.distributed_config={fsdp_size: 4}", "train.save_strategy='no'")
    with pytest.raises(LaunchError, match="fsdp_size: 4 need 4 processes, and 8 train"):
        stages.settle_settings(run, elsewhere=True, processes=8)
    assert stages.settle_settings(run, elsewhere=True).args.model_init_kwargs["distributed_config"] == {"fsdp_size": 4}


MISFITS = {  # override -> the fields of the model, and the fault
    "train.parallelism_config={sp_size: 3}": (
        {},
        "`sp_size: 3` does not divide the heads .* 4 attention heads",
        "2 or 4",
    ),
    "train.parallelism_config={sp_size: 8}": ({}, "`sp_size: 8` does not divide the heads", "Use 2 or 4"),
    "model.distributed_config={tp_size: 4}": ({"num_key_value_heads": 2}, "4 attention heads and 2 of keys", "Use 2."),
    "train.parallelism_config={cp_size: 2}": (
        {"layer_types": ["full_attention", "sliding_attention"]},
        "layers of sliding_attention, and context parallelism attends to the whole row",
        "remove `cp_size`",
    ),
    "train.parallelism_config={sp_size: 2}": (
        {"layer_types": ["full_attention", "linear_attention"]},
        "layers of linear_attention, and these layers carry a state along",
        "remove `sp_size`",
    ),
}


@pytest.mark.parametrize("override", MISFITS)
def test_division_that_the_heads_or_layers_of_the_model_cannot_take_is_refused(here, override):
    fields, problem, fix = MISFITS[override]
    run = load_run(override)
    config = load.find_model(run).config
    for name, value in fields.items():
        setattr(config, name, value)
    with pytest.raises(RecipeError, match=rf"(?s){problem}.*{fix}"):
        parallelism.check_model(run, config)


def test_sequence_parallelism_repeats_fewer_heads_of_keys(here):
    run = load_run("train.parallelism_config={sp_size: 4}")
    config = load.find_model(run).config
    config.num_key_value_heads = 2
    parallelism.check_model(run, config)
