"""The words by which other trainers and papers call the keys of a recipe, as data.

Inputs and outputs: none; `suggested_keys` reads these tables. A word is written in small letters without `_` and `-`.
Not here: old names of the owners (`renamed_keys`), and names that several owners share.
"""

from __future__ import annotations


def _list_words(table: dict[str, str]) -> dict[str, str]:
    """Return word -> key from key -> words."""
    return {word.replace("_", ""): key for key, words in table.items() for word in words.split()}


# Words that mean exactly this key: the value stays as it is.
SYNONYMS = _list_words(
    {
        "model.name_or_path": "base_model model_name model_path model_id model_dir base_model_name_or_path "
        "pretrained_model pretrained_model_name_or_path model_name_or_path hf_model path_to_model",
        "model.revision": "model_revision base_model_revision",
        "model.dtype": "model_dtype torch_dtype weight_dtype",
        "tokenizer.chat_template": "chat_template_path chat_template_file prompt_template chat_template_name",
        "tokenizer.pad_token": "padding_token",
        "quantization.load_in_4bit": "load4bit use_4bit four_bit bnb_4bit",
        "quantization.load_in_8bit": "load8bit use_8bit eight_bit bnb_8bit",
        "lora.r": "lora_r lora_rank rank peft_lora_r",
        "lora.lora_alpha": "peft_lora_alpha",
        "lora.lora_dropout": "peft_lora_dropout",
        "lora.target_modules": "lora_target_modules lora_modules target_layers",
        "lora.modules_to_save": "lora_modules_to_save",
        "lora.use_rslora": "rslora rs_lora",
        "lora.use_dora": "dora peft_use_dora lora_use_dora",
        "data.train": "dataset datasets train_data training_data train_file train_files training_file train_dataset "
        "dataset_path data_path dataset_name train_path data_file data_files train_set input_data",
        "data.eval": "eval_data eval_file eval_files eval_dataset eval_datasets test_datasets val_data val_file "
        "val_dataset valid_file validation validation_data validation_file validation_set test_data test_file "
        "eval_path dev_file dev_data evaluation_data val eval_set",
        "train.learning_rate": "lr learningrate base_lr max_lr peak_lr",
        "train.num_train_epochs": "epochs num_epochs epoch n_epochs max_epochs train_epochs num_training_epochs",
        "train.max_steps": "steps max_train_steps num_steps num_train_steps train_steps training_steps total_steps "
        "max_iters iterations num_training_steps",
        "train.per_device_train_batch_size": "batch_size micro_batch_size train_batch_size bs micro_train_batch_size "
        "train_micro_batch_size_per_gpu device_batch_size per_gpu_batch_size batch_size_per_device batch "
        "per_device_batch_size",
        "train.per_device_eval_batch_size": "eval_batch_size val_batch_size test_batch_size",
        "run.global_batch_size": "global_batch_size total_batch_size effective_batch_size train_global_batch_size",
        "train.gradient_accumulation_steps": "grad_accum grad_acc gas ga gradient_accumulation accumulation_steps "
        "grad_accum_steps accumulate_grad_batches grad_accumulation_steps gradient_accumulation_step accum_steps",
        "train.gradient_checkpointing": "grad_checkpointing grad_checkpoint gradient_checkpoint "
        "activation_checkpointing recompute checkpoint_activations",
        "train.max_length": "max_seq_len max_seq_length max_len cutoff_len sequence_len seq_len seq_length "
        "sequence_length context_length max_context_length context_len block_size max_sequence_length",
        "train.warmup_steps": "warmup num_warmup_steps lr_warmup_steps warmup_step lr_warmup warmup_iters",
        "train.lr_scheduler_type": "scheduler lr_scheduler lr_schedule scheduler_type schedule learning_rate_scheduler",
        "train.optim": "optimizer optimizer_type optim_type optimizer_name",
        "train.weight_decay": "wd",
        "train.max_grad_norm": "gradient_clipping grad_clip clip_grad clip_grad_norm max_norm gradient_clip_val "
        "grad_norm_clip",
        "train.adam_beta1": "beta1",
        "train.adam_beta2": "beta2",
        "train.adam_epsilon": "epsilon adam_eps eps",
        "train.neftune_noise_alpha": "neftune neftune_alpha neftune_noise noise_alpha",
        "train.packing": "sample_packing pack pack_sequences use_packing neat_packing",
        "train.eval_packing": "eval_sample_packing",
        "train.bf16": "bfloat16 use_bf16",
        "train.fp16": "float16 use_fp16",
        "train.use_liger_kernel": "liger use_liger liger_kernel enable_liger_kernel",
        "train.torch_compile": "compile use_torch_compile",
        "train.logging_steps": "log_steps log_interval log_every logging_interval log_every_n_steps log_freq "
        "logging_step",
        "train.save_steps": "save_every save_interval checkpointing_steps checkpoint_every save_freq save_step "
        "checkpoint_interval checkpoint_steps",
        "train.save_total_limit": "max_checkpoints keep_checkpoints save_limit total_limit keep_last_n_checkpoints",
        "train.eval_steps": "eval_every eval_interval evaluation_steps eval_freq val_steps eval_step",
        "train.report_to": "log_with logger tracker trackers logging_backend reporters",
        "train.run_name": "wandb_run_name wandb_name experiment_name",
        "train.seed": "random_seed train_seed",
        "train.output_dir": "output output_directory out out_dir outdir output_path output_folder save_dir save_path "
        "save_folder checkpoint_dir ckpt_dir result_dir results_dir run_dir",
        "train.dataloader_num_workers": "num_workers workers dataloader_workers num_dataloader_workers",
        "train.dataset_num_proc": "num_proc preprocessing_num_workers dataset_processes preprocess_workers",
        "train.hub_model_id": "hub_id hub_repo repo_id push_to_hub_model_id",
        "train.metric_for_best_model": "best_metric",
        "evaluate.generation.max_new_tokens": "generation_max_new_tokens max_new_token",
    }
)
# Words that mean exactly this key inside of one section, and may mean something else outside.
SECTION_SYNONYMS = {
    section: {word.replace("_", ""): key for key, words in table.items() for word in words.split()}
    for section, table in {
        "model": {"name_or_path": "name path id model repo_id folder"},
        "tokenizer": {"chat_template": "template"},
        "lora": {"lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "targets modules target"},
        "data": {"train": "path file files train_set training name_or_path"},
        "train": {"output_dir": "dir folder"},
    }.items()
}
# Words that mean a section, if a mapping stands below them.
SECTIONS = _list_words(
    {
        "model": "model_config model_args model_arguments",
        "tokenizer": "tokenizer_config tokenizer_args",
        "quantization": "quantization_config bnb_config bitsandbytes bitsandbytes_config quant_config",
        "lora": "lora_config peft_config peft lora_args lora_arguments",
        "data": "data_config data_args data_arguments",
        "train": "training training_args training_arguments trainer train_config training_config sft_config sft "
        "train_args trainer_args",
        "launch": "launcher",
    }
)
# Words for what no key sets: the instruction.
INSTRUCTIONS = {
    "wandbproject": "Set the environment variable WANDB_PROJECT, and `train.report_to: wandb`.",
    "wandbentity": "Set the environment variable WANDB_ENTITY, and `train.report_to: wandb`.",
    "usewandb": "Set `train.report_to: wandb`.",
    "hftoken": "Set the environment variable HF_TOKEN, or run `hf auth login`.",
    "cudavisibledevices": "Set the environment variable CUDA_VISIBLE_DEVICES.",
    "device": "Remove it: a GPU is used where there is one. `train.use_cpu: true` trains on the CPU.",
    "earlystoppingpatience": "Set `run.early_stopping: {patience: N}` with its number instead.",
    "earlystoppingthreshold": "Set `run.early_stopping: {threshold: X}` with its number instead.",
}
# Words that are near to a key, whose value may have to change: the key is suggested, and no program writes it.
RELATED = _list_words(
    {
        "lora.lora_alpha": "alpha",
        "train.max_length": "max_tokens",
        "train.weight_decay": "decay",
        "train.shuffle_dataset": "shuffle shuffle_data",
        "train.run_name": "name",
        "train.adam_beta1": "betas adam_betas",
        "tokenizer.chat_template": "template",
        "data.eval_fraction": "val_set_size val_size validation_split val_split test_size eval_size eval_ratio "
        "val_ratio validation_ratio eval_split test_split held_out",
        "data.loss_on": "train_on_inputs train_on_prompt mask_prompt mask_inputs train_on_input "
        "response_only completion_only assistant_only loss_mask train_on_responses_only mask_history roles_to_train",
        "data.overlong": "truncation excess_length_strategy overlong_strategy drop_long",
        "lora.target_modules": "lora_target lora_target_linear",
        "lora": "use_lora use_peft peft adapter finetuning_type peft_type enable_lora lora_config peft_config",
        "quantization": "quant quantize quantization_bit quantization_config bits bnb_config",
        "model.attn_implementation": "flash_attention flash_attn use_flash_attention use_flash_attn attn attention "
        "use_flash_attention2 xformers_attention sdp_attention",
        "train.bf16": "precision mixed_precision amp",
        "launch.engine": "deepspeed fsdp zero_stage strategy accelerator ds_config deepspeed_config fsdp_config",
        "launch.nproc_per_node": "gpus num_gpus n_gpus n_gpu num_processes devices",
        "run.overwrite": "overwrite_output overwrite_output_dir",
        "run.resume": "resume_from resume_from_checkpoint auto_resume",
        "run.max_hours": "time_limit max_time",
        "data.train.max_rows": "max_samples num_samples max_train_samples limit subset num_rows",
        "data.train.rename": "column_mapping columns field_mapping column_names",
        "data.train.format": "dataset_format data_format dataset_type",
        "data.train.wording": "prompt_format prompt_style",
        "train.lr_scheduler_kwargs": "min_lr min_lr_ratio cosine_min_lr_ratio min_lr_rate",
        "train.eval_strategy": "do_eval evaluate_during_training val_check_interval evals_per_epoch",
        "train.save_strategy": "do_save saves_per_epoch",
        "evaluate.metrics": "compute_metrics metrics",
    }
)
# The same for the keys of one source of rows.
SOURCE_SYNONYMS = _list_words(
    {
        "path": "file filename file_path file_name dataset dataset_path data_path data_file data_files source",
        "format": "type dataset_type data_format dataset_format row_format",
        "max_rows": "max_samples num_samples limit num_rows max_examples n_rows max_train_samples",
        "weight": "ratio probability prob proportion sampling_weight mixing_weight",
    }
)
SOURCE_RELATED = _list_words(
    {
        "rename": "column_mapping columns field_mapping column_names",
        "wording": "template prompt_format prompt_style prompt_template prompt",
    }
)
