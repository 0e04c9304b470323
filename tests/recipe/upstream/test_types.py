"""The choices of keys are those of the live classes, and a wrong value is refused with what to write."""

import dataclasses
import enum
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate.utils import DynamoBackend
from transformers import GenerationConfig
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
from transformers.modeling_utils import AttentionInterface
from transformers.training_args import trainer_log_levels
from trl import SFTConfig

from trl_sft.errors import RecipeError
from trl_sft.model import packed_attention as attention_by_document
from trl_sft.recipe import sections
from trl_sft.recipe.upstream import keys, types
from trl_sft.training.memory import fake_model

TRAIN = keys.get_fields("train")
BEGINNING = "model: {name_or_path: trl_sft:tiny}\ndata: {train: rows.jsonl}\n"


def enumerations():
    """Return every field of SFTConfig that the live class turns into a member of an enumeration."""
    live = SFTConfig(output_dir="x", bf16=False, use_cpu=True)
    values = {field.name: getattr(live, field.name) for field in dataclasses.fields(live)}
    return {name: type(value) for name, value in values.items() if isinstance(value, enum.Enum)}


def test_choices_are_the_members_of_the_live_enumerations():
    live = enumerations()
    assert {"optim", "lr_scheduler_type", "eval_strategy", "save_strategy", "hub_strategy"} <= set(live)
    for name, kind in live.items():
        assert list(types.list_choices(TRAIN[name])) == [member.value for member in kind], name


def test_choices_of_metadata_are_those_of_the_live_field():
    with_choices = [field for field in dataclasses.fields(SFTConfig) if field.metadata.get("choices")]
    for field in with_choices:
        assert list(types.list_choices(TRAIN[field.name])) == list(field.metadata["choices"]), field.name
    assert len(with_choices) >= 5
    assert list(types.list_choices(TRAIN["log_level"])) == list(trainer_log_levels)


def test_choices_that_no_type_shows_are_the_live_ones():
    assert set(types.list_choices(TRAIN["report_to"])) == {*INTEGRATION_TO_CALLBACK, "all", "none"}
    assert set(types.list_choices(TRAIN["torch_compile_backend"])) == {m.value.lower() for m in DynamoBackend}
    assert set(types.list_choices(TRAIN["torch_compile_mode"])) == set(torch._inductor.list_mode_options())
    attention = types.list_choices(keys.get_fields("model")["attn_implementation"])
    registered_by_us = {
        attention_by_document.DOCUMENTS,
        fake_model.ATTENTION,
    }  # by tests that ran before in this process
    assert set(attention) == {*AttentionInterface._global_mapping, "eager"} - registered_by_us
    for name in types.list_choices(keys.get_fields("quantization")["bnb_4bit_compute_dtype"]):
        assert isinstance(getattr(torch, name), torch.dtype)
    for name in types.list_choices(keys.get_fields("quantization")["bnb_4bit_quant_storage"]):
        transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_storage=name)


@pytest.mark.parametrize("place", keys.WORDS, ids=".".join)
def test_every_word_list_is_read_from_the_installed_sources(place):
    assert len(types._read_word_list(keys.WORDS[place])) > len(keys.WORDS[place].extra_words)


@pytest.mark.parametrize("name", ["cache_implementation", "early_stopping"])
def test_words_of_generation_are_those_that_its_check_accepts(name):
    field = keys.get_fields(keys.GENERATION)[name]
    for word in types.list_choices(field):
        GenerationConfig(**{name: word, "num_beams": 2, "do_sample": False})
    assert not types.accepts(field, "bogus")
    with pytest.raises(ValueError, match=name):
        GenerationConfig(**{name: "bogus"})


def test_types_of_generation_accept_the_defaults_of_the_live_config():
    defaults = GenerationConfig._get_default_generation_params()
    fields = keys.get_fields(keys.GENERATION)
    assert [n for n, value in defaults.items() if n in fields and not types.accepts(fields[n], value)] == []
    typed = [name for name, field in fields.items() if field.type is not None]
    assert len(typed) > 50
    assert all(types.accepts(fields[name], None) for name in typed)


# what stands under a section -> what the message says
WRONG = {
    "train: {optim: adamw_troch}": "Did you mean `adamw_torch`? Write one of",
    "train: {lr_scheduler_type: linaer}": "Did you mean `linear`? Write one of",
    "train: {report_to: wandbb}": "Did you mean `wandb`? Write one of",
    "train: {report_to: [wandb, tensorbord]}": "or a list of them",
    "train: {log_level: loud}": "one of detail, debug",
    "train: {debug: 'underflow_overflow nan'}": "one of underflow_overflow",
    "train: {torch_compile_backend: inducter}": "Did you mean `inductor`? Write one of",
    "train: {torch_compile_mode: max}": "max-autotune",
    "train: {include_num_input_tokens_seen: some}": "non_padding",
    "train: {lr_scheduler_kwargs: {min_lr: 1}}": "has no key `min_lr`",
    "train: 0.25": "the section is 0.25 (number)",
    "lora: [8]": "the section is [8] (list)",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycle: 1}}": "Did you mean `num_cycles`?",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: {num_cycles: half}}": "lr_scheduler_kwargs.num_cycles",
    "train: {lr_scheduler_type: cosine, lr_scheduler_kwargs: '{\"num_cycle\": 1}'}": "Did you mean `num_cycles`?",
    "train: {lr_scheduler_type: constant, lr_scheduler_kwargs: {last_epoch: 1}}": "reads no key of this mapping",
    "train: {lr_scheduler_type: warmup_stable_decay}": "needs the argument `num_decay_steps`",
    "train: {lr_scheduler_kwargs: cosine.json}": "a mapping",
    "train: {gradient_checkpointing_kwargs: {use_reentrent: true}}": "Did you mean `use_reentrant`?",
    "train: {gradient_checkpointing_kwargs: {use_reentrant: 'no'}}": "Write false.",
    "train: {accelerator_config: {split_batch: true}}": "Did you mean `split_batches`?",
    "train: {accelerator_config: {gradient_accumulation_kwargs: {sync_each_batches: true}}}": "mean `sync_each_batch`?",
    "train: {optim: sgd, optim_args: 'momentun=0.9'}": "Did you mean `momentum`?",
    "train: {optim: sgd, optim_args: momentum}": "name=value",
    "train: {optim: adamw_torch, optim_args: 'rank=8'}": "reads no key of this mapping",
    "lora: {loftq_config: {loftq_bit: 4}}": "Did you mean `loftq_bits`?",
    "lora: {runtime_config: {ephemeral_gpu_offload: true}}": "YAML cannot write LoraRuntimeConfig",
    "lora: {eva_config: {rhoo: 2.0}}": "EvaConfig",
    "lora: {rank_pattern: [8]}": "a mapping",
    "lora: {init_lora_weights: pissa_niter_}": "one of gaussian",
    "model: {name_or_path: trl_sft:tiny, attn_implementation: spda}": "Did you mean `sdpa`? Write one of",
    "model: {name_or_path: trl_sft:tiny, dtype: float8}": "Did you mean `float32`? Write one of",
    "model: {name_or_path: trl_sft:tiny, dtype: []}": "one of bfloat16",
    "evaluate: {generation: {do_sample: true, temprature: 0.5}}": "Did you mean `temperature`?",
    "evaluate: {generation: {temperature: hot}}": "a number",
    "evaluate: {generation: {max_new_tokens: 1.5}}": "a whole number",
    "evaluate: {generation: {cache_implementation: statik}}": "Did you mean `static`? Write one of",
    "evaluate: {generation: {early_stopping: always}}": "one of never",
    "evaluate: {generation: {watermarking_config: {seeding_scheme: hash}}}": "one of selfhash, lefthash",
    "evaluate: {generation: {compile_config: {mode: default}}}": "YAML cannot write its class",
    "evaluate: {generation: {num_return_sequences: 2}}": "each prompt is answered once",
    "evaluate: {generation: {voice: 2}}": "explain evaluate.generation` lists the keys",
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
def test_right_value_is_accepted(text, here):
    from trl_sft import load_recipe

    (here / "r.yaml").write_text(BEGINNING + text)
    load_recipe("r.yaml")


def test_kernel_of_the_hub_is_accepted_as_an_attention():
    field = keys.get_fields("model")["attn_implementation"]
    assert types.accepts(field, "kernels-community/flash-attn2@v1:flash")
    assert not types.accepts(field, "kernels-community/a/b")


def test_recipe_with_nested_mappings_is_checked_without_a_heavy_import(here):
    (here / "r.yaml").write_text(BEGINNING + "\n".join(["train: {lr_scheduler_kwargs: {}, optim: sgd}", RIGHT[6]]))
    heavy = "{'torch', 'transformers', 'trl', 'datasets', 'peft', 'accelerate'}"
    code = f"import sys, trl_sft; trl_sft.load_recipe('r.yaml'); sys.exit(' '.join({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert not done.stderr.strip()


def test_every_own_key_has_a_type_that_can_be_described():
    for section in (*sections.OWN_KEYS, keys.GENERATION):
        for field in keys.get_fields(section).values():
            assert types.describe(field)
