"""What a file for LLaMA-Factory means.

Names and defaults are those of llamafactory/hparams in 0.9.5, with those of transformers' TrainingArguments, which
it takes too. In: its settings and its dataset_info.json. Out: lines of a recipe; a default that trains something
else than ours is a line too. What its data sets mean stands in `llamafactory_rows`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

from trl_sft.importers import llamafactory_rows
from trl_sft.importers.settings import (
    Given,
    Item,
    Left,
    RecipeLine,
    engine_of,
    left,
    refuse,
    renamed,
    today,
    train_names,
)
from trl_sft.recipe import sections

_SAME = {
    **{"model_name_or_path": "model.name_or_path", "trust_remote_code": "model.trust_remote_code"},
    **{"model_revision": "model.revision", "cache_dir": "model.cache_dir", "use_fast_tokenizer": "tokenizer.use_fast"},
    **{"cutoff_len": "train.max_length", "preprocessing_num_workers": "train.dataset_num_proc"},
    **{"moe_aux_loss_coef": "train.router_aux_loss_coef", "overwrite_output_dir": "run.overwrite"},
    "enable_liger_kernel": "model.use_kernels",
}
_NOTES = {
    "cutoff_len": "LLaMA-Factory shortens question and answer alike, here the end is cut",
    "overwrite_output_dir": "here it also takes away what an earlier run left in the folder",
    "enable_liger_kernel": "kernels of the hub in place of Liger's",
}
_WHY = {
    "a run trains and then evaluates what is held out": ("do_train", "do_eval", "do_predict", "predict_with_generate"),
    "rows become tokens once and are kept in a cache of their own": (
        *("overwrite_cache", "tokenized_path", "preprocessing_batch_size", "data_shared_file_system", "buffer_size"),
    ),
    "log.jsonl holds every logged value": ("plot_loss", "logging_dir", "include_num_input_tokens_seen"),
    "the launcher sets it": (
        "local_rank",
        "ray_num_workers",
        "ray_init_kwargs",
        "ray_run_name",
        "resources_per_worker",
    ),
    "token accuracy is always counted": ("compute_accuracy", "include_effective_tokens_per_second"),
    "log in with `hf auth login`": ("hf_hub_token", "ms_hub_token", "om_hub_token", "hub_token"),
    "weights are loaded piece by piece": ("low_cpu_mem_usage", "offload_folder"),
    "the cache is off while a model trains": ("use_kv_cache",),
    "padding carries no loss": ("ignore_pad_token_for_loss",),
    "nothing is printed of it": ("print_param_status",),
    "for answers of a server, which a run does not start": (
        "infer_backend",
        "infer_dtype",
        "vllm_maxlen",
        "vllm_gpu_util",
    ),
    "images, video and audio are not built in this version": (
        *("media_dir", "freeze_vision_tower", "freeze_multi_modal_projector", "freeze_language_model"),
        *("image_max_pixels", "image_min_pixels", "video_max_pixels", "video_min_pixels", "video_fps", "video_maxlen"),
    ),
    "the chat template decides on a thought": ("preserve_thinking",),
}
_LEFT = {name: why for why, names in _WHY.items() for name in names}
_ABSENT = (
    *("adapter_folder", "resize_vocab", "split_special_tokens", "add_tokens", "add_special_tokens", "rope_scaling"),
    *(
        "new_special_tokens_config",
        "shift_attn",
        "mixture_of_depths",
        "use_unsloth",
        "use_unsloth_gc",
        "upcast_layernorm",
    ),
    *("upcast_lmhead_output", "train_from_scratch", "loraplus_lr_ratio", "create_new_adapter", "use_llama_pro"),
    *(
        "use_galore",
        "use_apollo",
        "use_badam",
        "use_adam_mini",
        "use_muon",
        "use_dft_loss",
        "use_asft_loss",
        "use_eaft_loss",
    ),
    *(
        "early_stopping_steps",
        "disable_shuffling",
        "default_system",
        "tool_format",
        "eval_on_each_dataset",
        "use_swanlab",
    ),
    *("quantization_device_map", "fp8", "use_mca", "use_kt", "pissa_convert", "use_hyper_parallel"),
)
_OTHER = (
    *(
        "stage",
        "finetuning_type",
        "adapter_name_or_path",
        "flash_attn",
        "disable_gradient_checkpointing",
        "use_reentrant_gc",
    ),
    *(
        "pure_bf16",
        "lora_rank",
        "lora_alpha",
        "lora_dropout",
        "lora_target",
        "additional_target",
        "use_rslora",
        "use_dora",
    ),
    *(
        "pissa_init",
        "pissa_iter",
        "quantization_bit",
        "quantization_method",
        "quantization_type",
        "double_quantization",
    ),
    *("freeze_trainable_layers", "freeze_trainable_modules", "freeze_extra_modules", "loraplus_lr_embedding"),
)
_ATTENTION = {"disabled": "eager", "sdpa": "sdpa", "fa2": "flash_attention_2", "fa3": "flash_attention_3"}
_DEFAULT = "LLaMA-Factory's default"


def names() -> Collection[str]:
    """Return every name that is known here."""
    return {*_SAME, *_LEFT, *_ABSENT, *_OTHER, *llamafactory_rows.NAMES, *train_names()}


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of each setting, and the defaults that matter. Raises RecipeError."""
    if (stage := given.get("stage", "sft")) not in ("sft", "pt"):
        raise refuse(given, "stage", f"stage: {stage}", "sft or pt; trl_sft does supervised fine-tuning alone")
    if given.get("model_name_or_path") is None:
        raise refuse(given, "model_name_or_path", "no model is named", "model_name_or_path: FOLDER or HUB ID")
    if "stage" in given.values:
        yield Left(
            "stage", "pt: rows are texts" if stage == "pt" else "supervised fine-tuning is all that is done here"
        )
    yield from renamed(given, _SAME, _NOTES)
    if given.get("cutoff_len") is None:
        yield RecipeLine(("train", "max_length"), 2048, (), f"{_DEFAULT}; {_NOTES['cutoff_len']}")
    yield from left(given, _LEFT)
    for name in _ABSENT:
        if given.get(name):
            yield Left(name, "not built in this version", aloud=True)
    yield from _model(given)
    yield from _tuning(given)
    yield from llamafactory_rows.lines(given)
    yield from _train(given)


def _model(given: Given) -> Iterator[Item]:
    attention = given.get("flash_attn", "auto")
    if attention in _ATTENTION:
        yield RecipeLine(("model", "attn_implementation"), _ATTENTION[attention], ("flash_attn",))
    elif "flash_attn" in given.values:
        yield Left("flash_attn", f"{attention}: transformers decides, here too")
    if given.get("adapter_name_or_path"):
        why = "an adapter that training goes on with is the model here: model.name_or_path: its folder, and no lora:"
        yield Left("adapter_name_or_path", why, aloud=True)
    saves = not given.get("disable_gradient_checkpointing")
    if today("gradient_checkpointing") not in given.values and "gradient_checkpointing" not in given.values:
        used = ("disable_gradient_checkpointing",) if "disable_gradient_checkpointing" in given.values else ()
        yield RecipeLine(("train", today("gradient_checkpointing")), saves, used, "" if used else _DEFAULT)
    if saves:
        reentrant = {"use_reentrant": given.get("use_reentrant_gc", True)}
        used = ("use_reentrant_gc",) if "use_reentrant_gc" in given.values else ()
        key = ("train", today("gradient_checkpointing_kwargs"))
        yield RecipeLine(key, reentrant, used, "" if used else _DEFAULT)


def _tuning(given: Given) -> Iterator[Item]:
    kind = given.get("finetuning_type", "lora")
    used = ("finetuning_type",) if "finetuning_type" in given.values else ()
    if kind not in ("lora", "full"):
        raise refuse(given, "finetuning_type", f"finetuning_type: {kind}", "lora or full; trl_sft builds no other")
    if kind == "full":
        yield Left("finetuning_type", "full: all weights are trained where there is no lora:")
    else:
        yield from _lora(given, used)
    bits = given.get("quantization_bit")
    if bits is None:
        return
    if bits not in (4, 8) or given.get("quantization_method", "bnb") not in ("bnb", "bitsandbytes"):
        found = f"{bits} bits by {given.get('quantization_method', 'bnb')}"
        raise refuse(given, "quantization_bit", found, "4 or 8 bits by bnb; trl_sft quantizes with bitsandbytes alone")
    yield RecipeLine(("quantization", f"load_in_{bits}bit"), True, ("quantization_bit", "quantization_method"))
    if bits == 4:
        options = (("quantization_type", "quant_type", "nf4"), ("double_quantization", "use_double_quant", True))
        for name, target, default in options:
            written = given.get(name) is not None
            key = ("quantization", f"bnb_4bit_{target}")
            yield RecipeLine(key, given.get(name, default), (name,) if written else (), "" if written else _DEFAULT)


def _lora(given: Given, used: tuple[str, ...]) -> Iterator[Item]:
    """Yield the section `lora:` with LLaMA-Factory's defaults."""
    rank = given.get("lora_rank", 8)
    values = {"lora_rank": ("r", 8), "lora_alpha": ("lora_alpha", 2 * rank), "lora_dropout": ("lora_dropout", 0.0)}
    for name, (target, default) in values.items():
        written = given.get(name) is not None
        yield RecipeLine(
            ("lora", target), given.get(name, default), (name,) if written else used, "" if written else _DEFAULT
        )
    wanted = given.get("lora_target", "all")
    modules = [part.strip() for part in wanted.split(",")] if isinstance(wanted, str) else wanted
    value = "all-linear" if modules == ["all"] else modules
    written = given.get("lora_target") is not None
    yield RecipeLine(
        ("lora", "target_modules"), value, ("lora_target",) if written else used, "" if written else _DEFAULT
    )
    if more := given.get("additional_target"):
        kept = [part.strip() for part in more.split(",")] if isinstance(more, str) else more
        yield RecipeLine(("lora", "modules_to_save"), kept, ("additional_target",))
    for name in ("use_rslora", "use_dora"):
        if given.get(name):
            yield RecipeLine(("lora", name), True, (name,))
    if given.get("pissa_init"):
        steps = given.get("pissa_iter", 16)
        yield RecipeLine(
            ("lora", "init_lora_weights"),
            "pissa" if steps == -1 else f"pissa_niter_{steps}",
            ("pissa_init", "pissa_iter"),
        )


def _train(given: Given) -> Iterator[Item]:
    """Yield the fields of transformers' TrainingArguments, and their defaults where TRL has others."""
    known = {*train_names()} - {*sections.REFUSED["train"], *llamafactory_rows.NAMES, *_LEFT}
    for name in given.values:
        if given.get(name) is not None and name in known:
            yield RecipeLine(("train", name), given.get(name), (name,))
    defaults = {"learning_rate": 5e-5, "logging_steps": 500}
    for name, value in defaults.items():
        if given.get(name) is None:
            yield RecipeLine(("train", name), value, (), "transformers' default, as there")
    if given.get("pure_bf16"):
        yield RecipeLine(("model", "dtype"), "bfloat16", ("pure_bf16",))
    elif not given.get("bf16"):
        if given.get("bf16") is None:
            yield RecipeLine(("train", "bf16"), False, (), _DEFAULT)
    elif given.get("finetuning_type", "lora") == "lora":
        yield RecipeLine(
            ("model", "dtype"), "bfloat16", ("bf16",), "LLaMA-Factory loads frozen weights so; the adapter is float32"
        )
    resume = given.get("resume_from_checkpoint")
    if resume is not None:
        value = {True: "auto", False: "never"}.get(resume, resume)
        yield RecipeLine(("run", "resume"), value, ("resume_from_checkpoint",))
    if (file := given.get("deepspeed")) is not None:
        engine = engine_of(file)
        if not engine:
            why = "its ZeRO stage cannot be read from here: launch: {engine: zero2, config: FILE}"
            yield Left("deepspeed", why, aloud=True)
        else:
            yield RecipeLine(("launch", "engine"), engine, ("deepspeed",))
            if engine != "ddp":
                yield RecipeLine(("launch", "config"), file, ("deepspeed",))
    elif given.get("fsdp"):
        yield RecipeLine(("launch", "engine"), "fsdp", ("fsdp",))
        if given.get("fsdp_config"):
            yield RecipeLine(("launch", "config"), given.get("fsdp_config"), ("fsdp_config",))
