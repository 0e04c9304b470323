"""Names of a recipe's keys in axolotl, LLaMA-Factory and plain `trl sft`: tables for `other_trainer_rules`.

The names were checked against axolotl 0.19.0 (its schema and `load_cfg`), LLaMA-Factory 0.9.5 (its parsers of arguments
and of data) under transformers 5.6.0, and TRL 1.16.0 (its parser). Three unpacked steps of each trainer, with the rows
in the order of the file, gave the losses of a run of trl_sft, except for the newline after ChatML's end-of-turn token,
which LLaMA-Factory and TRL train.
"""

TRAINERS = ("axolotl", "llamafactory", "trl")
# keys that are written even where the recipe does not set them, because the trainers' defaults differ
ALWAYS = (
    *("model.name_or_path", "model.dtype", "data.loss_on", "data.overlong"),
    *("train.per_device_train_batch_size", "train.gradient_accumulation_steps", "train.learning_rate"),
    *("train.lr_scheduler_type", "train.warmup_steps", "train.weight_decay", "train.max_grad_norm", "train.optim"),
    *("train.adam_beta1", "train.adam_beta2", "train.adam_epsilon", "train.num_train_epochs", "train.max_steps"),
    *("train.seed", "train.bf16", "train.fp16", "train.max_length", "train.packing", "train.gradient_checkpointing"),
    *("train.logging_steps", "train.save_strategy", "train.eval_strategy", "train.report_to", "train.output_dir"),
)
LORA = ("lora.r", "lora.lora_alpha", "lora.lora_dropout", "lora.target_modules")
QUANT_TYPE, DOUBLE_QUANT = "quantization.bnb_4bit_quant_type", "quantization.bnb_4bit_use_double_quant"
FOUR_BIT = (QUANT_TYPE, DOUBLE_QUANT)
# names that axolotl shares with SFTConfig
AXOLOTL_SAME = (
    *("gradient_accumulation_steps", "learning_rate", "lr_scheduler_kwargs", "weight_decay", "max_grad_norm", "seed"),
    *("optim_args", "optim_target_modules", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "tf32"),
    *("gradient_checkpointing", "gradient_checkpointing_kwargs", "logging_steps", "save_total_limit"),
    *("save_only_model", "load_best_model_at_end", "metric_for_best_model", "greater_is_better"),
    *("auto_find_batch_size", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_prefetch_factor"),
    *("dataloader_drop_last", "torch_compile", "torch_compile_backend", "torch_compile_mode", "dataset_num_proc"),
    *("hub_model_id", "hub_strategy", "hub_revision", "activation_offloading", "torch_empty_cache_steps"),
    "neftune_noise_alpha",
)
AXOLOTL_TRAIN = {name: name for name in AXOLOTL_SAME} | {
    "per_device_train_batch_size": "micro_batch_size",
    "per_device_eval_batch_size": "eval_batch_size",
    "num_train_epochs": "num_epochs",
    "lr_scheduler_type": "lr_scheduler",
    "optim": "optimizer",
    "max_length": "sequence_len",
    "packing": "sample_packing",
    "eval_packing": "eval_sample_packing",
    "activation_checkpointing": "gradient_checkpointing",
    "activation_checkpointing_kwargs": "gradient_checkpointing_kwargs",
}
# LLaMA-Factory takes transformers' arguments under their names, but not TRL's, nor those newer than transformers 5.6
LLAMAFACTORY_TRAIN = {"max_length": "cutoff_len", "dataset_num_proc": "preprocessing_num_workers"}
NEWER_THAN_LLAMAFACTORY = {
    *("dataloader_multiprocessing_context", "dataloader_in_order", "activation_checkpointing_kwargs"),
}
LLAMAFACTORY_TEMPLATES = {"chatml", "alpaca", "vicuna", "llama3", "gemma", "gemma2", "gemma3", "qwen3", "deepseek3"}
LLAMAFACTORY_ATTENTION = {"sdpa": "sdpa", "eager": "disabled", "flash_attention_2": "fa2", "flash_attention_3": "fa3"}
# keys of the other sections: their names in axolotl, LLaMA-Factory and TRL
RENAMED = {
    "model.name_or_path": ("base_model", "model_name_or_path", "model_name_or_path"),
    "model.revision": ("revision_of_model", "model_revision", "model_revision"),
    "model.trust_remote_code": ("trust_remote_code", "trust_remote_code", "trust_remote_code"),
    "model.attn_implementation": ("attn_implementation", None, "attn_implementation"),
    "model.use_kernels": ("use_kernels", None, None),
    "model.experts_implementation": ("experts_implementation", None, None),
    "model.cache_dir": (None, "cache_dir", None),
    "quantization.load_in_8bit": ("load_in_8bit", None, "load_in_8bit"),
    "quantization.load_in_4bit": ("load_in_4bit", None, "load_in_4bit"),
    "quantization.bnb_4bit_quant_type": (None, "quantization_type", "bnb_4bit_quant_type"),
    "quantization.bnb_4bit_use_double_quant": (None, "double_quantization", "use_bnb_nested_quant"),
    "quantization.bnb_4bit_quant_storage": (None, None, "bnb_4bit_quant_storage"),
    "lora.r": ("lora_r", "lora_rank", "lora_r"),
    "lora.lora_alpha": ("lora_alpha", "lora_alpha", "lora_alpha"),
    "lora.lora_dropout": ("lora_dropout", "lora_dropout", "lora_dropout"),
    "lora.use_rslora": ("peft_use_rslora", "use_rslora", "use_rslora"),
    "lora.use_dora": ("peft_use_dora", "use_dora", "use_dora"),
    "lora.modules_to_save": ("lora_modules_to_save", None, "lora_modules_to_save"),
    "lora.target_parameters": ("lora_target_parameters", None, "lora_target_parameters"),
    "lora.layers_to_transform": ("peft_layers_to_transform", None, None),
    "lora.rank_pattern": ("lora_rank_pattern", None, None),
    "lora.alpha_pattern": ("lora_alpha_pattern", None, None),
    "lora.init_lora_weights": ("peft_init_lora_weights", None, None),
}
AXOLOTL_TRACKERS = {
    "wandb": "use_wandb",
    "tensorboard": "use_tensorboard",
    "mlflow": "use_mlflow",
    "trackio": "use_trackio",
}
