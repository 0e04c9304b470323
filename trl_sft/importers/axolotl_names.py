"""The names of axolotl's settings, as tables: those that stay as they are, those without an equivalent, and why.

From axolotl/utils/schemas in 0.19.0. What the rest means stands in `from_axolotl`.
"""

from __future__ import annotations

SAME = {
    **{"base_model": "model.name_or_path", "revision_of_model": "model.revision", "use_kernels": "model.use_kernels"},
    **{"trust_remote_code": "model.trust_remote_code", "attn_implementation": "model.attn_implementation"},
    **{"device_map": "model.device_map", "max_memory": "model.max_memory", "tokenizer_use_fast": "tokenizer.use_fast"},
    **{
        "experts_implementation": "model.experts_implementation",
        "seed": "train.seed",
        "output_dir": "train.output_dir",
    },
    **{"chat_template_kwargs": "tokenizer.chat_template_kwargs", "dataset_processes": "train.dataset_num_proc"},
    **{"dataset_num_proc": "train.dataset_num_proc", "eval_batch_size": "train.per_device_eval_batch_size"},
    **{"eval_sample_packing": "train.eval_packing", "wandb_name": "train.run_name"},
    **{
        name: f"train.{name}"
        for name in (
            *("max_steps", "max_grad_norm", "adam_beta1", "adam_beta2", "adam_epsilon", "optim_args", "logging_steps"),
            *("optim_target_modules", "lr_scheduler_kwargs", "neftune_noise_alpha", "hub_model_id", "hub_strategy"),
            *(
                "torch_compile",
                "torch_compile_backend",
                "torch_compile_mode",
                "load_best_model_at_end",
                "save_only_model",
            ),
            *("metric_for_best_model", "greater_is_better", "dataloader_num_workers", "dataloader_prefetch_factor"),
            *("dataloader_drop_last", "dataloader_pin_memory", "auto_find_batch_size", "activation_offloading"),
            *("torch_empty_cache_steps", "ddp_timeout", "ddp_bucket_cap_mb", "ddp_find_unused_parameters"),
            *("ddp_broadcast_buffers", "accelerator_config", "remove_unused_columns", "pad_to_multiple_of"),
        )
    },
}
NOTES = {
    "eval_sample_packing": "unset there it follows sample_packing, as here",
    "max_grad_norm": "0 clips nothing",
}
WHY = {
    "the model's own configuration says it": (
        *(
            "model_type",
            "tokenizer_type",
            "is_llama_derived_model",
            "is_mistral_derived_model",
            "is_qwen_derived_model",
        ),
        *(
            "is_falcon_derived_model",
            "processor_type",
            "tokenizer_legacy",
            "tokenizer_save_jinja_files",
            "base_model_config",
        ),
    ),
    "rows become tokens once and are kept in a cache of their own": (
        *("dataset_prepared_path", "skip_prepare_dataset", "dataset_keep_in_memory", "is_preprocess"),
        *("push_dataset_to_hub", "num_dataset_shards_to_save", "preprocess_iterable"),
    ),
    "changes no trained token: rows are padded to the longest of a batch, packs are full": (
        *("pad_to_sequence_len", "sample_packing_group_size", "sample_packing_bin_size", "multipack_real_batches"),
        *("sample_packing_sequentially", "sample_packing_mp_start_method", "batch_flattening"),
    ),
    "rows are drawn at random, by train.seed": ("shuffle_merged_datasets", "shuffle_before_merging_datasets"),
    "a kernel of axolotl's; the same result without it": (
        *("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel", "chunked_cross_entropy"),
        *("chunked_cross_entropy_num_chunks", "tiled_mlp", "tiled_mlp_num_shards", "flash_attn_cross_entropy"),
        *("flash_attn_fuse_mlp", "liger_rope", "liger_rms_norm", "liger_layer_norm", "liger_glu_activation"),
        *(
            "liger_fused_linear_cross_entropy",
            "liger_cross_entropy",
            "cut_cross_entropy",
            "sdpa_varlen",
        ),
        *("unsloth_lora_mlp", "unsloth_lora_qkv", "unsloth_lora_o", "unsloth_cross_entropy_loss"),
    ),
    "the tracker reads it from the environment: WANDB_PROJECT and its like": (
        *("wandb_project", "wandb_entity", "wandb_watch", "wandb_log_model", "wandb_mode", "wandb_run_id"),
        *("mlflow_tracking_uri", "mlflow_experiment_name", "mlflow_run_name", "hf_mlflow_log_artifacts"),
        *("comet_api_key", "comet_workspace", "comet_project_name", "trackio_project_name", "trackio_run_name"),
    ),
    "keys are always checked": ("strict",),
    "the launcher sets it": ("local_rank", "world_size", "ddp", "device"),
    "weights are always saved as safetensors": ("save_safetensors",),
    "rank and alpha of every layer are lora.r and lora.lora_alpha; lora.rank_pattern tells layers apart": (
        "lora_rank_pattern",
        "lora_alpha_pattern",
    ),
    "nothing is printed of it": ("debug", "include_tkps", "include_tokens_per_second", "gc_steps", "gc_collect_steps"),
    "log in with `hf auth login`": ("hf_use_auth_token",),
}
LEFT = {name: why for why, names in WHY.items() for name in names}
# what changes the training and is not built here
ABSENT = (
    "plugins",
    *(
        "tokens",
        "added_tokens_overrides",
        "eot_tokens",
        "default_system_message",
        "fix_untrained_tokens",
        "embedding_lr",
    ),
    *(
        "embedding_lr_scale",
        "unfrozen_parameters",
        "early_stopping_patience",
        "loraplus_lr_ratio",
        "loraplus_lr_embedding",
    ),
    *(
        "relora",
        "relora_prune_ratio",
        "lisa_n_layers",
        "rope_scaling",
        "curriculum_sampling",
        "min_sample_len",
        "lr_groups",
    ),
    *(
        "loss_watchdog_threshold",
        "loss_watchdog_patience",
        "cosine_min_lr_ratio",
        "cosine_constant_lr_ratio",
        "lr_quadratic_warmup",
    ),
    *("dataset_exact_deduplication", "sequence_parallel_degree", "context_parallel_size", "tensor_parallel_size"),
    *(
        "dp_shard_size",
        "dp_replicate_size",
        "tokenizer_config",
        "resize_token_embeddings_to_32x",
        "overrides_of_model_config",
    ),
    *(
        "overrides_of_model_kwargs",
        "group_by_length",
        "use_ray",
        "layer_offloading",
        "selective_checkpointing",
        "eval_table_size",
    ),
    *(
        "do_bench_eval",
        "do_causal_lm_eval",
        "generate_samples",
        "eval_sequence_len",
        "gptq",
        "fp8",
        "qat",
        "quantization",
    ),
)
OTHER = (
    *("rl", "reward_model", "process_reward_model", "adapter", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs"),
    *("gradient_accumulation_steps", "micro_batch_size", "batch_size", "num_epochs", "learning_rate", "weight_decay"),
    *(
        "optimizer",
        "lr_scheduler",
        "sequence_len",
        "sample_packing",
        "bf16",
        "fp16",
        "tf32",
        "bfloat16",
        "float16",
        "float32",
    ),
    *(
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "warmup_steps",
        "warmup_ratio",
        "excess_length_strategy",
    ),
    *("eval_steps", "evals_per_epoch", "eval_strategy", "evaluation_strategy", "save_steps", "saves_per_epoch"),
    *("save_strategy", "save_total_limit", "resume_from_checkpoint", "auto_resume_from_checkpoints", "use_tensorboard"),
    *("use_wandb", "use_mlflow", "use_comet", "use_trackio", "deepspeed", "fsdp", "fsdp_config", "special_tokens"),
    *("flash_attention", "sdp_attention", "eager_attention", "flex_attention", "xformers_attention", "sage_attention"),
    *("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "lora_target_linear", "lora_target_parameters"),
    *("lora_modules_to_save", "lora_fan_in_fan_out", "peft_use_dora", "peft_use_rslora", "peft_layers_to_transform"),
    *("peft_layers_pattern", "peft_init_lora_weights", "lora_exclude_modules", "lora_model_dir"),
)
# its names for LoRA -> peft's
LORA = {
    **{"lora_r": "r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout", "peft_use_dora": "use_dora"},
    **{"lora_target_parameters": "target_parameters", "lora_modules_to_save": "modules_to_save"},
    **{
        "lora_fan_in_fan_out": "fan_in_fan_out",
        "peft_use_rslora": "use_rslora",
        "lora_exclude_modules": "exclude_modules",
    },
    **{"peft_layers_to_transform": "layers_to_transform", "peft_layers_pattern": "layers_pattern"},
    "peft_init_lora_weights": "init_lora_weights",
}
