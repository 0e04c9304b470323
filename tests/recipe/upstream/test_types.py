"""Types in depth: choices and the keys of mappings are those of the live classes; wrong ones are told at once."""

import ast
import dataclasses
import enum
import inspect
import subprocess
import sys
import warnings

import peft
import pytest
import torch
import transformers
from accelerate.utils import DynamoBackend, GradientAccumulationPlugin
from peft import LoraConfig
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig, optimization
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import AttentionInterface
from transformers.trainer_pt_utils import AcceleratorConfig
from transformers.training_args import trainer_log_levels
from trl import SFTConfig

from trl_sft.errors import RecipeError
from trl_sft.model import packed_attention as attention_by_document
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import keys, nested, source, types
from trl_sft.training.memory import fake_model

TRAIN = keys.get_fields("train")
BEGINNING = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\n"


def enumerations():
    """Return every field of SFTConfig that the live class turns into a member of an enumeration."""
    live = SFTConfig(output_dir="x", bf16=False, use_cpu=True)
    found = {field.name: getattr(live, field.name) for field in dataclasses.fields(live)}
    return {name: type(value) for name, value in found.items() if isinstance(value, enum.Enum)}


def test_choices_are_the_members_of_the_live_enumerations():
    live = enumerations()
    assert {"optim", "lr_scheduler_type", "eval_strategy", "save_strategy", "hub_strategy"} <= set(live)
    for name, kind in live.items():
        assert list(types.list_choices(TRAIN[name])) == [member.value for member in kind], name


def test_choices_of_metadata_are_those_of_the_live_field():
    found = 0
    for field in dataclasses.fields(SFTConfig):
        if field.metadata.get("choices"):
            assert list(types.list_choices(TRAIN[field.name])) == list(field.metadata["choices"]), field.name
            found += 1
    assert found >= 5
    assert list(types.list_choices(TRAIN["log_level"])) == list(trainer_log_levels)


def test_choices_that_no_type_shows_are_the_live_ones():
    assert set(types.list_choices(TRAIN["report_to"])) == {*INTEGRATION_TO_CALLBACK, "all", "none"}
    assert set(types.list_choices(TRAIN["torch_compile_backend"])) == {m.value.lower() for m in DynamoBackend}
    assert set(types.list_choices(TRAIN["torch_compile_mode"])) == set(torch._inductor.list_mode_options())
    attention = types.list_choices(keys.get_fields("model")["attn_implementation"])
    ours = {attention_by_document.DOCUMENTS, fake_model._WAY}  # registered by what ran before in this process
    assert set(attention) == {*AttentionInterface._global_mapping, "eager"} - ours
    for name in types.list_choices(keys.get_fields("quantization")["bnb_4bit_compute_dtype"]):
        assert isinstance(getattr(torch, name), torch.dtype)
    for name in types.list_choices(keys.get_fields("quantization")["bnb_4bit_quant_storage"]):
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=name)


@pytest.mark.parametrize("listing", keys.WORDS, ids=".".join)
def test_every_listing_is_found_in_the_installed_sources(listing):
    assert len(types._read_word_list(keys.WORDS[listing])) > len(keys.WORDS[listing].also)


@pytest.mark.parametrize("name", ["cache_implementation", "early_stopping"])
def test_words_of_generation_are_those_that_its_check_lets_pass(name):
    field = keys.get_fields(keys.GENERATION)[name]
    for word in types.list_choices(field):
        GenerationConfig(**{name: word, "num_beams": 2, "do_sample": False})
    assert not types.accepts(field, "bogus")
    with pytest.raises(ValueError, match=name):
        GenerationConfig(**{name: "bogus"})


def test_types_of_generation_take_what_the_live_config_holds():
    defaults = GenerationConfig._get_default_generation_params()
    fields = keys.get_fields(keys.GENERATION)
    assert [n for n, value in defaults.items() if n in fields and not types.accepts(fields[n], value)] == []
    typed = [name for name, field in fields.items() if field.type is not None]
    assert len(typed) > 50
    assert all(types.accepts(fields[name], None) for name in typed)


def parameters(function):
    return {p.name: p for p in inspect.signature(function).parameters.values() if p.kind not in (2, 4)}


@pytest.mark.parametrize("kind", list(transformers.SchedulerType), ids=lambda k: k.value)
def test_keys_of_lr_scheduler_kwargs_are_the_arguments_of_the_live_scheduler(kind):
    found = nested.get_nested_fields("train", "lr_scheduler_kwargs", {"lr_scheduler_type": kind.value}).fields
    function = optimization.TYPE_TO_SCHEDULER_FUNCTION[kind]
    if kind.value in ("reduce_lr_on_plateau", "greedy"):
        name = {"greedy": "GreedyLR"}.get(kind.value, "ReduceLROnPlateau")
        function = getattr(optimization, name)
    given = {"optimizer", "num_warmup_steps", "num_training_steps"}
    live = {} if kind.value in ("constant", "constant_with_warmup") else parameters(function)
    assert set(found) == set(live) - given
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    numbers = {"num_decay_steps": 2, "num_stable_steps": None, "min_lr": 0.1, "timescale": 3, "mode": "min"}
    usable = {
        name: numbers.get(name, live[name].default) for name in found if name not in ("last_epoch", "min_lr_rate")
    }
    assert [name for name, value in usable.items() if not types.accepts(found[name], value)] == []
    transformers.get_scheduler(kind, optimizer, 1, 9, usable)


def test_keys_of_checkpointing_are_those_of_torch_trl_and_the_trainer():
    found = nested.get_nested_fields("train", "gradient_checkpointing_kwargs", {}).fields
    live = set(parameters(checkpoint)) - {"function", "context_fn"}
    assert live | {"preserve_rng_state", "every_n_layers", "offload"} == set(found) - {"selective"}
    assert types.list_choices(found["determinism_check"]) == ("default", "none")


@pytest.mark.parametrize(
    ("where", "name", "live"),
    [
        ("train", "accelerator_config", AcceleratorConfig),
        ("train.accelerator_config", "gradient_accumulation_kwargs", GradientAccumulationPlugin),
        ("lora", "loftq_config", peft.LoftQConfig),
        ("lora", "eva_config", peft.EvaConfig),
        ("lora", "corda_config", peft.tuners.lora.config.CordaConfig),
    ],
)
def test_keys_of_a_nested_mapping_are_the_fields_of_the_live_class(where, name, live):
    found = nested.get_nested_fields(where, name, {}).fields
    assert list(found) == [field.name for field in dataclasses.fields(live)]
    for field in dataclasses.fields(live):
        if field.default is not dataclasses.MISSING and field.default is not None:
            assert ast.literal_eval(found[field.name].default) == field.default
            assert types.accepts(found[field.name], field.default), field.name


def test_mapping_of_lora_is_taken_where_peft_makes_its_class_of_it():
    for name, field in keys.get_fields("lora").items():
        if keys.find_dataclasses(field) and name not in ("runtime_config", "loftq_config"):
            with warnings.catch_warnings(action="ignore"):  # peft warns of what it ignores
                live = LoraConfig(**{name: {}}) if types.accepts(field, {}) else None
            assert live is None or not isinstance(getattr(live, name), dict), name
    assert not types.accepts(keys.get_fields("lora")["runtime_config"], {})


def test_arguments_of_an_optimizer_are_those_that_its_handler_reads():
    read = lambda optim: set(nested.get_nested_fields("train", "optim_args", {"optim": optim}).fields)  # noqa: E731
    assert read("sgd") == {"momentum", "dampening", "weight_decay", "nesterov"}
    assert {"rank", "update_proj_gap", "scale", "proj_type"} == read("galore_adamw")
    assert read("adamw_torch") == set()
    assert nested.get_nested_fields("train", "optim_args", {"optim": "rmsprop_bnb"}) is None  # it hands all on


# what stands under a section -> what the message says
WRONG = {
    "train: {optim: adamw_troch}": "-> adamw_torch (one of",
    "train: {lr_scheduler_type: linaer}": "-> linear (one of",
    "train: {report_to: wandbb}": "-> wandb (one of",
    "train: {report_to: [wandb, tensorbord]}": "or a list of them",
    "train: {log_level: loud}": "one of detail, debug",
    "train: {debug: 'underflow_overflow nan'}": "one of underflow_overflow",
    "train: {torch_compile_backend: inducter}": "-> inductor (one of",
    "train: {torch_compile_mode: max}": "max-autotune",
    "train: {include_num_input_tokens_seen: some}": "non_padding",
    "train: {lr_scheduler_kwargs: {min_lr: 1}}": "has no key min_lr",
    "train: 0.25": "the section is 0.25 (number)",
    "lora: [8]": "the section is [8] (list)",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycle: 1}}": "-> num_cycles",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycles: half}}": "lr_scheduler_kwargs.num_cycles",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: '{\"num_cycle\": 1}'}": "-> num_cycles",
    "train: {lr_scheduler_type: constant, lr_scheduler_kwargs: {last_epoch: 1}}": "reads nothing of it",
    "train: {lr_scheduler_type: warmup_stable_decay}": "needs num_decay_steps",
    "train: {lr_scheduler_kwargs: cosine.json}": "a mapping",
    "train: {gradient_checkpointing_kwargs: {use_reentrent: true}}": "-> use_reentrant",
    "train: {gradient_checkpointing_kwargs: {use_reentrant: 'no'}}": "true or false",
    "train: {accelerator_config: {split_batch: true}}": "-> split_batches",
    "train: {accelerator_config: {gradient_accumulation_kwargs: {sync_each_batches: true}}}": "-> sync_each_batch",
    "train: {optim: sgd, optim_args: 'momentun=0.9'}": "-> momentum",
    "train: {optim: sgd, optim_args: momentum}": "name=value",
    "train: {optim: adamw_torch, optim_args: 'rank=8'}": "reads nothing of it",
    "lora: {loftq_config: {loftq_bit: 4}}": "-> loftq_bits",
    "lora: {runtime_config: {ephemeral_gpu_offload: true}}": "-> LoraRuntimeConfig",
    "lora: {eva_config: {rhoo: 2.0}}": "EvaConfig",
    "lora: {rank_pattern: [8]}": "a mapping",
    "lora: {init_lora_weights: pissa_niter_}": "one of gaussian",
    "model: {name_or_path: trl_sft:tiny, attn_implementation: spda}": "-> sdpa (one of",
    "model: {name_or_path: trl_sft:tiny, dtype: float8}": "-> float32 (one of",
    "model: {name_or_path: trl_sft:tiny, dtype: []}": "one of bfloat16",
    "evaluate: {generation: {temprature: 0.5}}": "-> temperature",
    "evaluate: {generation: {temperature: hot}}": "a number",
    "evaluate: {generation: {max_new_tokens: 1.5}}": "a whole number",
    "evaluate: {generation: {cache_implementation: statik}}": "-> static (one of",
    "evaluate: {generation: {early_stopping: always}}": "one of never",
    "evaluate: {generation: {watermarking_config: {seeding_scheme: hash}}}": "one of selfhash, lefthash",
    "evaluate: {generation: {compile_config: {mode: default}}}": "YAML cannot write its class",
    "evaluate: {generation: {num_return_sequences: 2}}": "each prompt is answered once",
    "evaluate: {generation: {voice: 2}}": "a key of transformers.GenerationConfig",
}


@pytest.mark.parametrize("text", WRONG)
def test_wrong_value_is_refused_with_what_to_write(text, here):
    from trl_sft import load_recipe

    beginning = BEGINNING if not text.startswith("model") else BEGINNING.split("\n", 1)[1]
    (here / "r.yaml").write_text(beginning + text)
    with pytest.raises(RecipeError) as caught:
        load_recipe("r.yaml")
    assert len(caught.value.faults) == 1, caught.value
    assert WRONG[text] in str(caught.value)


RIGHT = [
    "train: {optim: sgd, optim_args: 'momentum=0.9, nesterov=true'}",
    "train: {lr_scheduler_type: warmup_stable_decay, lr_scheduler_kwargs: {num_decay_steps: 3}}",
    "train: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr_rate: 0.1}}",
    "train: {gradient_checkpointing_kwargs: {use_reentrant: false, every_n_layers: 2}, debug: underflow_overflow}",
    "train: {accelerator_config: {even_batches: false, gradient_accumulation_kwargs: {sync_each_batch: true}}}",
    "train: {torch_compile_backend: INDUCTOR, report_to: [wandb, tensorboard], include_num_input_tokens_seen: true}",
    "lora: {init_lora_weights: pissa_niter_4, loftq_config: {loftq_bits: 4}}",
    "lora: {trainable_token_indices: {embed_tokens: [1, 2]}, layer_replication: [[0, 2], [1, 3]]}",
    "evaluate: {generation: {do_sample: true, temperature: 1, eos_token_id: [1, 2], stop_strings: [a]}}",
    "evaluate: {generation: {exponential_decay_length_penalty: [3, 1.1], sequence_bias: [[[1], 2.0]]}}",
]


@pytest.mark.parametrize("text", RIGHT)
def test_right_value_is_taken(text, here):
    from trl_sft import load_recipe

    (here / "r.yaml").write_text(BEGINNING + text)
    load_recipe("r.yaml")


def test_kernel_of_the_hub_is_an_attention():
    field = keys.get_fields("model")["attn_implementation"]
    assert types.accepts(field, "kernels-community/flash-attn2@v1:flash")
    assert not types.accepts(field, "kernels-community/a/b")


def test_recipe_is_checked_in_depth_without_a_heavy_import(here):
    (here / "r.yaml").write_text(BEGINNING + "\n".join(["train: {lr_scheduler_kwargs: {}, optim: sgd}", RIGHT[6]]))
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate'}"
    code = f"import sys, trl_sft; trl_sft.load_recipe('r.yaml'); sys.exit(' '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()


def test_statement_is_found_whole_though_its_brackets_close_at_the_margin():
    node = source.find_statement("torch.utils.checkpoint", "checkpoint")
    assert isinstance(node, ast.FunctionDef)
    assert node.end_lineno > 100
    assert source.find_statement("torch.utils.checkpoint", "no_such_name") is None
    assert source.resolve("trl.trainer.base_config", "TrainingArguments") == (
        "transformers.training_args",
        "TrainingArguments",
    )


def test_every_key_of_ours_has_a_type_that_is_understood():
    for section in (*sections.OWN_KEYS, keys.GENERATION):
        for field in keys.get_fields(section).values():
            assert types.describe(field)
