"""What a file for axolotl means.

Names and defaults are those of axolotl/utils/schemas and axolotl/core/builders in 0.19.0. In: its settings. Out:
lines of a recipe; a default of axolotl that trains something else than ours is a line too. What its data sets
mean stands in `axolotl_rows`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

from trl_sft.importers import axolotl_rows
from trl_sft.importers.axolotl_names import ABSENT, LEFT, LORA, NOTES, OTHER, SAME
from trl_sft.importers.settings import Given, Item, Left, RecipeLine, engine_of, left, refuse, renamed, today
from trl_sft.recipe.upstream import keys, types

_DEFAULT = "axolotl's default"
_ATTENTION = {
    **{"flash_attention": "flash_attention_2", "sdp_attention": "sdpa", "eager_attention": "eager"},
    "flex_attention": "flex_attention",
}


def names() -> Collection[str]:
    """Return every name that is known here."""
    return {*SAME, *LEFT, *ABSENT, *OTHER, *axolotl_rows.NAMES}


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of each setting, and the defaults that matter. Raises RecipeError."""
    for name in ("rl", "reward_model", "process_reward_model"):
        if given.get(name):
            raise refuse(
                given, name, f"{name}: {given.get(name)}", "a file for supervised fine-tuning: trl_sft does that alone"
            )
    yield from renamed(given, SAME, NOTES)
    yield from left(given, LEFT)
    for name in ABSENT:
        if given.get(name):
            yield Left(name, "not built in this version", aloud=True)
    yield from _model(given)
    yield from _adapter(given)
    yield from axolotl_rows.lines(given)
    yield from _batch(given)
    yield from _precision(given)
    yield from _rhythm(given)
    yield from _launch(given)


def _line(given: Given, key: str, name: str, default: Any, note: str = "") -> RecipeLine:
    """Return the line of a setting, or of axolotl's default."""
    written = given.get(name) is not None
    said = "; ".join(filter(None, (note, "" if written else _DEFAULT)))
    return RecipeLine(tuple(key.split(".")), given.get(name, default), (name,) if written else (), said)


def _model(given: Given) -> Iterator[Item]:
    if given.get("base_model") is None:
        raise refuse(given, "base_model", "no model is named", "base_model: FOLDER or HUB ID")
    for name, value in _ATTENTION.items():
        if given.get(name) and given.get("attn_implementation") is None:
            yield RecipeLine(("model", "attn_implementation"), value, (name,))
    for name in ("xformers_attention", "sage_attention"):
        if given.get(name):
            yield Left(name, "transformers has no such attention: model.attn_implementation takes its names")
    for name, value in (given.get("special_tokens") or {}).items():
        if name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            yield RecipeLine(("tokenizer", name), value, ("special_tokens",))
        else:
            yield Left("special_tokens", f"{name}: not built in this version", aloud=True)


def _adapter(given: Given) -> Iterator[Item]:
    adapter = given.get("adapter")
    if adapter not in (None, "lora", "qlora"):
        raise refuse(given, "adapter", f"adapter: {adapter}", "lora or qlora; trl_sft builds no other")
    if given.get("lora_model_dir"):
        why = "an adapter that training goes on with is the model here: model.name_or_path: its folder, and no lora:"
        yield Left("lora_model_dir", why, aloud=True)
    if adapter is None:
        return
    for name, target in LORA.items():
        if given.get(name) not in (None, [], False):
            yield RecipeLine(("lora", target), given.get(name), (name, "adapter"))
    if given.get("lora_dropout") is None:
        yield RecipeLine(("lora", "lora_dropout"), 0.0, ("adapter",), _DEFAULT)
    modules = given.get("lora_target_modules")
    if given.get("lora_target_linear"):
        more = "; lora_target_modules are among them" if modules else ""
        yield RecipeLine(
            ("lora", "target_modules"),
            "all-linear",
            ("lora_target_linear", "lora_target_modules"),
            "all but the head" + more,
        )
    elif modules:
        yield RecipeLine(("lora", "target_modules"), modules, ("lora_target_modules",))
    kinds = {"qlora": "load_in_4bit", "lora": "load_in_8bit"}
    if given.get(kinds[adapter]):
        yield RecipeLine(("quantization", kinds[adapter]), True, (kinds[adapter], "adapter"))
    if adapter == "qlora" and given.get("load_in_4bit"):
        extra = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True} | (
            given.get("bnb_config_kwargs") or {}
        )
        for name, value in extra.items():
            yield RecipeLine(
                ("quantization", name),
                value,
                ("bnb_config_kwargs",) if given.get("bnb_config_kwargs") else (),
                _DEFAULT,
            )


def _batch(given: Given) -> Iterator[Item]:
    yield _line(given, "train.per_device_train_batch_size", "micro_batch_size", 1)
    steps = given.get("gradient_accumulation_steps")
    if steps is None and given.get("batch_size"):
        steps = given.get("batch_size") // given.get("micro_batch_size", 1)
        yield RecipeLine(
            ("train", "gradient_accumulation_steps"), steps, ("batch_size",), "batch_size / micro_batch_size"
        )
    else:
        yield _line(given, "train.gradient_accumulation_steps", "gradient_accumulation_steps", 1)
    yield _line(given, "train.num_train_epochs", "num_epochs", 1.0)
    yield _line(given, "train.max_length", "sequence_len", 512)
    yield _line(
        given,
        "train.packing",
        "sample_packing",
        False,
        "documents do not see each other, in axolotl neither" if given.get("sample_packing") else "",
    )
    yield _line(given, "train.learning_rate", "learning_rate", 5e-5)
    yield _line(given, "train.weight_decay", "weight_decay", 0.0)
    schedule = given.get("lr_scheduler", "cosine")
    if schedule in ("one_cycle", "rex"):
        yield RecipeLine(("train", "lr_scheduler_type"), "cosine", (), f"in the place of {schedule}")
        yield Left("lr_scheduler", f"{schedule} is axolotl's own: cosine stands in its place", aloud=True)
    else:
        yield _line(given, "train.lr_scheduler_type", "lr_scheduler", "cosine")
    optimizer = given.get("optimizer", "adamw_torch_fused")
    if types.accepts(keys.get_fields("train")["optim"], optimizer):
        yield _line(given, "train.optim", "optimizer", "adamw_torch_fused")
    else:
        yield Left("optimizer", "axolotl's own: the default of train.optim trains", aloud=True)


def _precision(given: Given) -> Iterator[Item]:
    bf16, half = given.get("bf16", given.get("bfloat16", "auto")), given.get("fp16", given.get("float16"))
    used = tuple(name for name in ("bf16", "bfloat16") if given.get(name) is not None)
    loads = "axolotl loads all weights in bfloat16; float32 with bf16: true is TRL's way"
    if bf16 in (True, "full") and not half:
        yield RecipeLine(("train", "bf16"), True, used)
        yield RecipeLine(("model", "dtype"), "bfloat16", used, loads)
    elif bf16 == "auto" and not half:
        yield RecipeLine(
            ("model", "dtype"), "bfloat16", used, f"{loads}; bf16: auto is TRL's default where the machine has it"
        )
    else:
        yield RecipeLine(("train", "bf16"), False, used)
    if half:
        yield RecipeLine(("train", "fp16"), True, ("fp16", "float16"))
    if given.get("tf32") not in (None, "auto"):
        yield RecipeLine(("train", "tf32"), given.get("tf32"), ("tf32",))
    saves = given.get("gradient_checkpointing", False)
    name = today("gradient_checkpointing")
    if isinstance(saves, bool):
        yield _line(given, f"train.{name}", "gradient_checkpointing", False)
    else:
        yield RecipeLine(
            ("train", name),
            True,
            ("gradient_checkpointing",),
            f"{saves} there; train.activation_offloading offloads here",
        )
    if saves and given.get("gradient_checkpointing_kwargs"):
        key = f"train.{today('gradient_checkpointing_kwargs')}"
        yield _line(given, key, "gradient_checkpointing_kwargs", None)


def _rhythm(given: Given) -> Iterator[Item]:
    """Yield warm-up, evaluation, saving and logging."""
    if given.get("warmup_steps") is not None:
        yield _line(given, "train.warmup_steps", "warmup_steps", None)
    else:
        most = "" if given.get("warmup_ratio") is not None else ", at most 100 there"
        yield _line(given, "train.warmup_steps", "warmup_ratio", 0.03, f"a share of all steps{most}")
    epochs = given.get("num_epochs", 1.0)
    for kind, each, every in (("eval", "evals_per_epoch", "eval_steps"), ("save", "saves_per_epoch", "save_steps")):
        if kind == "eval" and not axolotl_rows.holds_out(given):
            continue
        strategy = given.get(f"{kind}_strategy", given.get("evaluation_strategy") if kind == "eval" else "epoch")
        share = 1 / (given.get(each) * epochs) if given.get(each) else None
        if share and share < 1:
            yield RecipeLine(
                ("train", every), round(share, 6), (each,), f"{given.get(each)} an epoch: a share of all steps"
            )
            yield RecipeLine(("train", f"{kind}_strategy"), "steps", (each,))
        elif given.get(every):
            yield _line(given, f"train.{every}", every, None)
            yield RecipeLine(("train", f"{kind}_strategy"), "steps", (every,))
        elif strategy:
            used = tuple(name for name in (f"{kind}_strategy", "evaluation_strategy") if given.get(name))
            yield RecipeLine(("train", f"{kind}_strategy"), strategy, used, "" if used else _DEFAULT)
    yield _line(given, "train.save_total_limit", "save_total_limit", 4)
    if given.get("resume_from_checkpoint") or given.get("auto_resume_from_checkpoints"):
        value = given.get("resume_from_checkpoint") or "auto"
        yield RecipeLine(("run", "resume"), value, ("resume_from_checkpoint", "auto_resume_from_checkpoints"))
    trackers = {
        "use_wandb": "wandb",
        "wandb_project": "wandb",
        "use_tensorboard": "tensorboard",
        "use_mlflow": "mlflow",
    }
    trackers |= {"use_comet": "comet_ml", "use_trackio": "trackio"}
    asked = [name for name in trackers if given.get(name)]
    if asked:
        yield RecipeLine(("train", "report_to"), list(dict.fromkeys(trackers[name] for name in asked)), tuple(asked))


def _launch(given: Given) -> Iterator[Item]:
    if (file := given.get("deepspeed")) is not None:
        if engine := engine_of(file):
            yield RecipeLine(("launch", "engine"), engine, ("deepspeed",))
            if engine != "ddp":
                yield RecipeLine(("launch", "config"), file, ("deepspeed",))
        else:
            yield Left(
                "deepspeed",
                "its ZeRO stage cannot be read from here: launch: {engine: zero2, config: FILE}",
                aloud=True,
            )
    elif given.get("fsdp") or given.get("fsdp_config"):
        yield RecipeLine(("launch", "engine"), "fsdp", ("fsdp", "fsdp_config"))
        if given.get("fsdp_config"):
            yield RecipeLine(
                ("launch", "config"),
                given.get("fsdp_config"),
                ("fsdp_config",),
                "the keys are axolotl's, without the prefix fsdp_",
            )
