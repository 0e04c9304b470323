"""The frozen surface of a recipe, as data: sections, own keys, what is refused and why.

Here stand only names that no installed owner declares. Everything else is read from the owners.
`tests/test_structure.py` holds that own keys and owners' names are disjoint.
"""

from __future__ import annotations

# section -> (whom its keys belong to, the definition that `owners` reads; "" = the tuples below or ours)
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
# the mapping under evaluate.generation; GenerationConfig declares no fields, it takes them off its keywords
GENERATION = ("transformers.GenerationConfig", "transformers.generation.configuration_utils:GenerationConfig.__init__")
# ending of a file of rows -> the builder of datasets that reads it
BUILDERS = {
    **{".json": "json", ".jsonl": "json", ".csv": "csv", ".tsv": "csv"},
    **{".parquet": "parquet", ".arrow": "arrow", ".txt": "text"},
}
LOAD_DATASET = ("datasets.load_dataset", "datasets.load:load_dataset")

# The row formats that `data.formats` reads; a test holds the two equal.
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

# Own keys and their types. `data.*` are the keys of one source.
OWN_KEYS: dict[str, dict[str, str]] = {
    "model": {"name_or_path": "str"},
    "tokenizer": {"chat_template": "str", "chat_template_kwargs": "dict[str, Any]"},
    "quantization": {},
    "lora": {},
    "data": {
        "train": "Any",
        "eval": "Any",
        "eval_fraction": "float",
        "loss_on": "Literal['completion', 'assistant', 'last_turn', 'all']",
        "overlong": "Literal['truncate', 'drop', 'truncate_and_end', 'error']",
        "special_tokens_in_text": "Literal['refuse', 'text']",
        "drop_leaked": "bool",
        "max_untrained": "float",
    },
    "data.*": {
        "path": "str",
        "format": "str",  # a layout, or a function of the user's; `schema` checks which
        "wording": "Literal['chat', 'plain', 'alpaca', 'chinese', 'vicuna', 'basic', 'question_answer', "
        "'conversation', 'task', 'chain_of_thought'] | dict[str, str]",
        "rename": "dict[str, str]",
        "task": "str",
        "weight": "float",
        "max_rows": "int",
    },
    "train": {},
    "evaluate": {"metrics": "list[Literal['exact_match']]", "max_rows": "int", "generation": "dict[str, Any]"},
    "launch": {
        "engine": "Literal['auto', 'ddp', 'fsdp', 'zero1', 'zero2', 'zero3', 'ray']",
        "config": "str | dict[str, Any]",  # for the engine, as its owner writes it
    },
    "run": {
        "resume": "str",
        "overwrite": "bool",
        "allow": "list[Literal['changed_recipe', 'changed_data', 'untrained_rows', 'leaking_packing', "
        "'prompt_mismatch', 'template_markers']]",
        "max_hours": "float",
        "logits_gib": "float",
        "global_batch_size": "int",
    },
}

# Parts of the recipe's design that this version does not carry out: refused by name, never ignored.
NOT_YET = {
    "evaluate": ("prompts",),
    "run": ("early_stopping",),
}

# `from_pretrained(**kwargs)` declares no names; these are the documented ones that YAML can write.
# https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.from_pretrained
# https://huggingface.co/docs/transformers/model_doc/auto#transformers.AutoTokenizer.from_pretrained
_FILES = {
    "cache_dir": "str",
    "force_download": "bool",
    "local_files_only": "bool",
    "revision": "str",
    "token": "str | bool",
    "trust_remote_code": "bool",
}
KEYWORDS: dict[str, dict[str, str]] = {
    "model": _FILES
    | {
        "attn_implementation": "str",
        "code_revision": "str",
        "dtype": "str",
        "device_map": "str | int | dict[str, Any]",
        "experts_implementation": "str",
        "key_mapping": "dict[str, str]",
        "max_memory": "dict[str, Any]",
        "offload_buffers": "bool",
        "offload_folder": "str",
        "use_kernels": "bool",
        "use_safetensors": "bool",
        "variant": "str",
    },
    "tokenizer": _FILES
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

# What our own keys are for, as `explain` and the JSON Schema show it.
OWN_HELP: dict[str, dict[str, str]] = {
    "model": {
        "name_or_path": "The model to tune: a folder, a hub id, or trl_sft:tiny. An adapter's folder goes on with it."
    },
    "tokenizer": {
        "chat_template": "A chat template for a model without one: chatml, vicuna, alpaca, chinese, one that TRL has "
        "for training, a .jinja file, or another tokenizer (folder or id).",
        "chat_template_kwargs": "Handed to the chat template, as enable_thinking is.",
    },
    "data": {
        "train": "What is trained: a path, {path: ...}, or a list of either.",
        "eval": "What is held out: a path, {path: ...}, or a list; each of several is evaluated under its own name.",
        "eval_fraction": "The share of the rows that is held out, between 0 and 1; the same rows for a train.seed.",
        "loss_on": "Where the loss falls: the last answer (completion, last_turn), every assistant turn, or all "
        "tokens. Unset: the response; in plain text without one, all.",
        "overlong": "What becomes of rows longer than train.max_length. Unset: truncate.",
        "special_tokens_in_text": "A special token inside a row's text: the row is refused (unset), or it is text.",
        "drop_leaked": "Rows to train that are held out too are dropped. Unset: true.",
        "max_untrained": "More than this share of rows without a trained token stops the run. Unset: 0.05.",
    },
    "data.*": {
        "path": "A file, a glob, a folder, a hub id, or trl_sft:skills.",
        "format": "The layout of a row; unset: recognised by its columns. Or FILE.py:FUNCTION of yours.",
        "wording": "How a row becomes text. Unset: chat, where the tokenizer has a chat template.",
        "rename": "Column of the file: the column that a format knows.",
        "task": "The name of the task of all rows of this source.",
        "weight": "This source's share of the rows of an epoch; for all sources, or for none.",
        "max_rows": "So many rows of this source, drawn with train.seed.",
    },
    "evaluate": {
        "metrics": "What is measured of the answers. Unset: exact_match.",
        "max_rows": "So many held-out prompts are answered before and after. Unset: 100.",
        "generation": "How answers are made; unset: greedily.",
    },
    "launch": {
        "engine": "How several processes share the training. Unset: auto.",
        "config": "The engine's own settings, a file or a mapping, handed on as they are.",
    },
    "run": {
        "resume": "auto (unset) goes on from the last checkpoint of this run; never; or a checkpoint's folder.",
        "overwrite": "A run that stands in train.output_dir is replaced. Unset: false.",
        "allow": "Refusals that you accept, by the name that they give.",
        "max_hours": "The run ends with a checkpoint after so many hours.",
        "logits_gib": "Without Triton: the most memory for logits, in GiB. Unset: 0.5.",
        "global_batch_size": "Rows of a step over all processes and accumulated batches.",
    },
}

# What a run sets itself where the recipe is silent: the closed list of departures that are keys (docs/explanation).
SETTLED: dict[tuple[str, str], str] = {
    ("data", "loss_on"): "the response, where rows have one",
    ("lora", "task_type"): "CAUSAL_LM: without it peft saves an adapter that AutoPeftModelForCausalLM cannot load",
    ("quantization", "bnb_4bit_compute_dtype"): "bfloat16, where the machine trains in it and weights have 4 bits",
    ("model", "use_safetensors"): "true: a pickle may run code when it is read",
    ("train", "bf16"): "false, where the machine has no bfloat16 or is a CPU",
    ("train", "dataloader_pin_memory"): "false, where there is no accelerator to copy to",
    ("train", "eos_token"): "the token with which the chat template ends a turn, where the tokenizer says another",
    ("train", "eval_on_start"): "true, where rows are held out: no end can be read without a beginning",
    ("train", "gradient_accumulation_steps"): "what run.global_batch_size comes to, where that is written",
    ("train", "fp16"): "true, on a GPU without bfloat16",
}

# Owner's keys that another section carries, or that YAML cannot write.
REFUSED: dict[str, dict[str, str]] = {
    "model": {
        "quantization_config": "the `quantization:` section",
        "load_in_8bit": "quantization: {load_in_8bit: true}",
        "load_in_4bit": "quantization: {load_in_4bit: true}",
        # TRL reads the configuration without it, so weights of one folder would meet the shape of another
        "subfolder": "that folder itself in model.name_or_path",
    },
    "quantization": {
        "quant_method": "load_in_8bit or load_in_4bit: this version quantizes with bitsandbytes alone",
    },
    "lora": {
        "peft_type": "nothing: the section is LoRA's",
        "base_model_name_or_path": "model.name_or_path",
        "inference_mode": "nothing: a run trains",
        "auto_mapping": "nothing: peft fills it",
        "peft_version": "nothing: peft fills it",
    },
    "data.*": {
        "data_files": "path",
        "features": "nothing: YAML cannot write datasets.Features",
        "download_config": "nothing: YAML cannot write datasets.DownloadConfig",
        "storage_options": "nothing: a local path or a hub id in path",
        "save_infos": "nothing: it is for the authors of data sets",
    },
    "launch": {
        **dict.fromkeys(["module", "no_python", "run_path"], "nothing: what is launched is this recipe"),
    },
    "evaluate.generation": {
        **dict.fromkeys(
            ("compile_config", "constraints", "continuous_batching_config"), "nothing: YAML cannot write its class"
        ),
        **dict.fromkeys(
            ("output_attentions", "output_hidden_states", "output_logits", "output_scores"),
            "nothing: only the answers are kept",
        ),
        "num_return_sequences": "nothing: each prompt is answered once",
        "return_dict_in_generate": "nothing: only the answers are kept",
        "transformers_version": "nothing: transformers fills it",
    },
    "train": {
        "model_init_kwargs": "the `model:` section",
        "trust_remote_code": "model.trust_remote_code",
        "chat_template_path": "tokenizer.chat_template",
        "dataset_kwargs": "the `data:` section",
        "deepspeed": "launch: {engine: zero2, config: FILE}",
        "fsdp": "launch: {engine: fsdp}",
        "fsdp_config": "launch: {engine: fsdp, config: FILE}",
        "parallelism_config": "nothing: this version trains in one process",
        "local_rank": "nothing: the launcher sets it",
        "resume_from_checkpoint": "run.resume",
        "dataset_text_field": "data.train: the column of `format: text` is `text`",
        "do_train": "nothing: a run trains",
        "do_eval": "data.eval or data.eval_fraction, and train.eval_strategy",
        "do_predict": "data.eval or data.eval_fraction",
        "pad_token": "tokenizer.pad_token",
    },
}
