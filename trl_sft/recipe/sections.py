"""The sections of a recipe, as data: who owns their keys, our own keys, and keys that a recipe cannot set.

Inputs and outputs: none; the other modules read these tables.
Not here: names that an installed owner declares; `upstream` reads them. `tests/test_structure.py` checks that our own
keys and the owners' keys are disjoint.
"""

from __future__ import annotations

# section -> (owner of its keys, the definition that `upstream.fields` reads; "" = the tables below have its keys)
OWNERS = {
    "model": ("AutoModelForCausalLM.from_pretrained", ""),
    "tokenizer": ("AutoTokenizer.from_pretrained", ""),
    "quantization": (
        "transformers.BitsAndBytesConfig",
        "transformers.utils.quantization_config:BitsAndBytesConfig.__init__",
    ),
    "lora": ("peft.LoraConfig", "peft.tuners.lora.config:LoraConfig"),
    "data": ("trl_sft", ""),
    "train": ("trl.SFTConfig", "trl.trainer.sft_config:SFTConfig"),
    "evaluate": ("trl_sft", ""),
    "launch": ("torchrun", "torch.distributed.run:get_args_parser"),
    "run": ("trl_sft", ""),
}
# The mapping under `evaluate.generation`. GenerationConfig declares no fields: it reads its keyword arguments.
GENERATION = ("transformers.GenerationConfig", "transformers.generation.configuration_utils:GenerationConfig.__init__")
# suffix of a data file -> the builder of `datasets` that reads it
BUILDERS = {
    **{".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text", ".md": "text"},
}
LOAD_DATASET = ("datasets.load_dataset", "datasets.load:load_dataset")

# The row formats that `data.formats` reads; a test checks that the two are equal.
FORMATS = (
    "messages",
    "sharegpt",
    "prompt_completion",
    "alpaca",
    "question_answer",
    "conversation",
    "task",
    "chain_of_thought",
    "text",
)

# The checks of answers that `evaluation.checks` has; a test checks that the two are equal.
CHECKS = (
    *("exact", "normalised", "numeric", "contains", "regex", "json", "json_equal", "json_schema", "code"),
    *("instructions", "refusal", "no_refusal", "chrf", "bleu"),
)

# Own keys and their types. `data.*` are the keys of one source.
OWN_KEYS: dict[str, dict[str, str]] = {
    "model": {"name_or_path": "str", "config": "dict[str, Any]"},
    "tokenizer": {"chat_template": "str", "chat_template_kwargs": "dict[str, Any]"},
    "quantization": {},
    "lora": {},
    "data": {
        "train": "Any",
        "eval": "Any",
        "eval_fraction": "float",
        "loss_on": "Literal['completion', 'assistant', 'last_turn', 'all'] | "
        "list[Literal['completion', 'assistant', 'last_turn', 'without_empty_thoughts']]",
        "overlong": "Literal['truncate', 'drop', 'truncate_and_end', 'error']",
        "special_tokens_in_text": "Literal['refuse', 'text']",
        "drop_leaked": "bool",
        "max_untrained": "float",
        "on_bad_row": "Literal['stop', 'drop']",
    },
    "data.*": {
        "path": "str",
        "format": "str",  # a row format, or a function of the user; `build` checks which
        "wording": "Literal['chat', 'plain', 'alpaca', 'chinese', 'vicuna', 'basic', 'question_answer', "
        "'conversation', 'task', 'chain_of_thought'] | dict[str, str]",
        "rename": "dict[str, str]",
        "task": "str",
        "weight": "float",
        "max_rows": "int",
    },
    "train": {},
    "evaluate": {
        "metrics": "list[Literal['exact_match']]",
        "max_rows": "int",
        "generation": "dict[str, Any]",
        "prompts": "str | list[Any]",
        "checks": "str | list[str]",
    },
    "launch": {
        "engine": "Literal['auto', 'ddp', 'fsdp', 'zero1', 'zero2', 'zero3', 'ray']",
        "config": "str | dict[str, Any]",  # in the form of the engine's own configuration
    },
    "run": {
        "resume": "str",
        "overwrite": "bool",
        "allow": "list[Literal['changed_recipe', 'changed_data', 'untrained_rows', 'leaking_packing', "
        "'prompt_mismatch', 'template_markers', 'unused_weights', 'unused_columns', 'truncated_answers']]",
        "max_hours": "float",
        "logits_gib": "float",
        "global_batch_size": "int",
        "price_per_hour": "float",
        "early_stopping": "bool | dict[str, Any]",
        "mirror": "str",
    },
}
# The keys of a mapping under an own key: name -> type and default.
OWN_NESTED_KEYS: dict[tuple[str, str], dict[str, tuple[str, str]]] = {
    ("run", "early_stopping"): {"patience": ("int", "3"), "threshold": ("float", "0.0")},
}
# own key that takes a mapping -> the key of the mapping that a number in its place surely stands for
NUMBER_MEANINGS = {"early_stopping": "patience"}

# Keys that a later version will support: this one refuses them by name and never ignores them.
NOT_YET: dict[str, tuple[str, ...]] = {}

# `from_pretrained(**kwargs)` declares no names. These are the documented ones that YAML can write.
# https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.from_pretrained
# https://huggingface.co/docs/transformers/model_doc/auto#transformers.AutoTokenizer.from_pretrained
_DOWNLOAD_KEYWORDS = {
    "cache_dir": "str",
    "force_download": "bool",
    "local_files_only": "bool",
    "revision": "str",
    "token": "str | bool",
    "trust_remote_code": "bool",
}
KEYWORDS: dict[str, dict[str, str]] = {
    "model": _DOWNLOAD_KEYWORDS
    | {
        "attn_implementation": "str",
        "code_revision": "str",
        "dtype": "str",
        "device_map": "str | int | dict[str, Any]",
        "distributed_config": "dict[str, Any]",
        "experts_implementation": "str",
        "key_mapping": "dict[str, str]",
        "max_memory": "dict[str, Any]",
        "offload_buffers": "bool",
        "offload_folder": "str",
        "use_kernels": "bool",
        "use_safetensors": "bool",
        "variant": "str",
    },
    "tokenizer": _DOWNLOAD_KEYWORDS
    | {
        "subfolder": "str",
        "add_bos_token": "bool",
        "add_eos_token": "bool",
        "add_prefix_space": "bool",
        "bos_token": "str",
        "eos_token": "str",
        "extra_special_tokens": "list[str] | dict[str, str]",
        "gguf_file": "str",
        "model_max_length": "int",
        "pad_token": "str",
        "padding_side": "Literal['left', 'right']",
        "tokenizer_type": "str",
        "truncation_side": "Literal['left', 'right']",
        "unk_token": "str",
        "use_fast": "bool",
    },
}

# What our own keys are for; `explain` and the JSON Schema show it.
OWN_HELP: dict[str, dict[str, str]] = {
    "model": {
        "name_or_path": "The model to fine-tune: a folder, a hub id, or trl_sft:tiny. With the folder of an "
        "adapter the run continues the training of that adapter.",
        "config": "Fields of the model's own configuration class, such as rope_parameters or attention_dropout; they "
        "replace those of its config.json.",
    },
    "tokenizer": {
        "chat_template": "The chat template, for a model without one: chatml, vicuna, alpaca, chinese, a training "
        "template of TRL, a .jinja file, or another tokenizer (folder or hub id).",
        "chat_template_kwargs": "Variables for the chat template, for example enable_thinking.",
    },
    "data": {
        "train": "The training data: a path, {path: ...}, or a list of either.",
        "eval": "The evaluation set: a path, {path: ...}, or a list. In a list, each entry has its own metrics.",
        "eval_fraction": "The share of the rows for the evaluation set, between 0 and 1. train.seed chooses the rows.",
        "loss_on": "Which tokens carry loss: the last answer (completion, last_turn), every assistant turn "
        "(assistant), or all. A list may add without_empty_thoughts. Unset: the answer; in plain text, all.",
        "overlong": "What happens to rows longer than train.max_length. Unset: truncate.",
        "special_tokens_in_text": "What happens if a row's text holds a special token: refuse (the run stops), or text "
        "(it is trained as plain text). Unset: refuse.",
        "drop_leaked": "Remove training rows that also occur in the evaluation set. Unset: true.",
        "max_untrained": "Stop the run if more than this share of the rows is left out or has no trained token. "
        "Unset: 0.05.",
        "on_bad_row": "What happens to rows that cannot be trained: stop (the run stops and names them), or drop (they "
        "are left out and counted). Unset: stop.",
    },
    "data.*": {
        "path": "A file, a glob, a folder, a hub id, or trl_sft:skills.",
        "format": "The row format, or your own function as FILE.py:FUNCTION. Unset: recognised by the columns.",
        "wording": "How a row becomes text. Unset: chat, if the tokenizer has a chat template.",
        "rename": "A mapping from columns of the file to the columns that the format expects.",
        "task": "The task of all rows of this source.",
        "weight": "The share of this source in the rows of an epoch; set it for all sources or for none.",
        "max_rows": "How many rows of this source to sample, with train.seed.",
    },
    "evaluate": {
        "metrics": "How generated answers are scored. Unset: exact_match.",
        "max_rows": "How many prompts of the evaluation set are answered before and after training. Unset: 100.",
        "generation": "How answers are generated. Unset: greedily.",
        "prompts": "Prompts of your own, answered before training, at each evaluation (or checkpoint) and after "
        "training: a list, a .txt file with one on each line, or a .jsonl file with `prompt` or `messages`.",
        "checks": "Compare base and tuned model after training, as the command `evaluate` does: the checks that score "
        "the answers, written as for its --check, or auto for those that fit the reference answers.",
    },
    "launch": {
        "engine": "How several processes share the training. Unset: auto.",
        "config": "The engine's own settings, as a file or a mapping; passed on unchanged.",
    },
    "run": {
        "resume": "auto (unset) continues from the last checkpoint of this run; never; or the folder of a checkpoint.",
        "overwrite": "Replace a run that is in train.output_dir. Unset: false.",
        "allow": "Problems that you accept. The message of a problem names its word.",
        "max_hours": "Stop with a checkpoint after this many hours.",
        "logits_gib": "The largest memory for logits, in GiB, on a machine without Triton. Unset: 0.5.",
        "global_batch_size": "Rows per optimizer step, over all processes and accumulated batches.",
        "price_per_hour": "What an hour of all devices costs, in any currency: the time left is shown as money too.",
        "early_stopping": "Stop once the eval loss no longer improves, and save the weights of the best evaluation: "
        "true, or {patience: 3, threshold: 0}. It sets the keys of `train:` that it needs.",
        "mirror": "A second place for the checkpoints: s3://BUCKET/PATH, hf://OWNER/NAME/PATH, file:///PATH. They are "
        "copied in the background and verified; at a new host the run goes on from there.",
    },
    "run.early_stopping": {
        "patience": "Evaluations in a row without an improvement, after which the run stops.",
        "threshold": "A change of the eval loss up to this size is no improvement.",
    },
}

# Keys that trl_sft sets if the recipe does not, with the value. These are all keys whose default is not upstream's.
OWN_DEFAULTS: dict[tuple[str, str], str] = {
    ("data", "loss_on"): "the answer, if the rows have one",
    ("lora", "task_type"): "CAUSAL_LM; without it peft saves an adapter that AutoPeftModelForCausalLM cannot load",
    ("quantization", "bnb_4bit_compute_dtype"): "bfloat16, if the machine can train in it and the weights have 4 bits",
    ("model", "use_safetensors"): "true, because a pickle file can run code when it is read",
    ("train", "bf16"): "false, on a CPU or a GPU without bfloat16",
    ("train", "dataloader_pin_memory"): "false, if there is no GPU to copy to",
    ("train", "eos_token"): "the end-of-turn token of the chat template, if the tokenizer's eos_token is another token",
    (
        "train",
        "eval_on_start",
    ): "true, if there is an evaluation set: the last eval loss is compared with the one before training",
    ("train", "gradient_accumulation_steps"): "the number that run.global_batch_size needs, if that is set",
    ("train", "fp16"): "true, on a GPU without bfloat16",
    ("train", "pad_to_multiple_of"): "the number that parallelism_config needs, if cp_size or sp_size divides rows",
    ("train", "use_cpu"): "true, if several processes train on CPUs: accelerate connects them only then",
}

# Keys of an owner that a recipe cannot set, with what to do instead: another key sets them, or YAML cannot write them.
REFUSED: dict[str, dict[str, str]] = {
    "model": {
        "quantization_config": "Use the section `quantization:`.",
        "load_in_8bit": "Use `quantization: {load_in_8bit: true}`.",
        "load_in_4bit": "Use `quantization: {load_in_4bit: true}`.",
        # TRL reads the configuration without it, so the weights of one folder would get the configuration of another
        "subfolder": "Name that folder itself in `model.name_or_path`.",
    },
    "quantization": {
        "quant_method": "Use `load_in_8bit` or `load_in_4bit`: this version quantizes with bitsandbytes only.",
    },
    "lora": {
        "peft_type": "Remove it: this section is always LoRA.",
        "base_model_name_or_path": "Use `model.name_or_path`.",
        "inference_mode": "Remove it: a run always trains.",
        "auto_mapping": "Remove it: peft sets it.",
        "peft_version": "Remove it: peft sets it.",
    },
    "data.*": {
        "data_files": "Use `path`.",
        "features": "Remove it: YAML cannot write datasets.Features.",
        "download_config": "Remove it: YAML cannot write datasets.DownloadConfig.",
        "storage_options": "Use `path` with a local path or a hub id.",
        "save_infos": "Remove it: it is for authors of data sets.",
    },
    "launch": {
        **dict.fromkeys(["module", "no_python", "run_path"], "Remove it: trl_sft always launches this recipe."),
    },
    "evaluate.generation": {
        **dict.fromkeys(
            ("compile_config", "constraints", "continuous_batching_config"), "Remove it: YAML cannot write its class."
        ),
        **dict.fromkeys(
            ("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
            "Remove it: only the answers are saved.",
        ),
        "num_return_sequences": "Remove it: each prompt is answered once.",
        "return_dict_in_generate": "Remove it: only the answers are saved.",
        "transformers_version": "Remove it: transformers sets it.",
    },
    "train": {
        "model_init_kwargs": "Use the section `model:`.",
        "trust_remote_code": "Use `model.trust_remote_code`.",
        "chat_template_path": "Use `tokenizer.chat_template`.",
        "dataset_kwargs": "Use the section `data:`.",
        "deepspeed": "Use `launch: {engine: zero2, config: FILE}`.",
        "fsdp": "Use `launch: {engine: fsdp}`.",
        "fsdp_config": "Use `launch: {engine: fsdp, config: FILE}`.",
        "local_rank": "Remove it: the launcher sets it.",
        "resume_from_checkpoint": "Use `run.resume`.",
        "dataset_text_field": "Use `format: text` and `rename: {COLUMN: text}` of the source.",
        "do_train": "Remove it: a run always trains.",
        "do_eval": "Set `data.eval` or `data.eval_fraction`, and `train.eval_strategy`.",
        "do_predict": "Set `data.eval` or `data.eval_fraction`.",
        "pad_token": "Use `tokenizer.pad_token`.",
    },
}
