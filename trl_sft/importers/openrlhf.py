"""What the flags of OpenRLHF's `train_sft` mean.

What is done with rows and batches is that of openrlhf/datasets/sft_dataset.py and cli/train_sft.py in 0.8.9 and
0.11.0. In: flags. Out: lines of a recipe; a default of OpenRLHF that trains something else than ours is a line too.
"""

from __future__ import annotations

import string
from collections.abc import Iterator
from typing import Any

from trl_sft.importers import openrlhf_flags
from trl_sft.importers.openrlhf_flags import FLAGS, LEFT
from trl_sft.importers.settings import Given, Item, Left, RecipeLine, left, refuse, several, source, today

_DEFAULT = "OpenRLHF's default"
_ROWS = "dataset dataset_split dataset_probs max_samples input_key output_key input_template apply_chat_template"


def lines(given: Given) -> Iterator[Item]:
    """Yield what became of each flag, and the defaults that matter. Raises RecipeError."""
    yield from left(given, LEFT)
    yield from _model(given)
    yield from _lora(given)
    yield from _data(given)
    yield from _optimizer(given)
    yield from _train(given)
    yield from _kept(given)
    stage = _value(given, "zero_stage")
    yield _line(given, "launch.engine", "zero_stage", {0: "ddp", 1: "zero1", 2: "zero2", 3: "zero3"}.get(stage, stage))


def _value(given: Given, name: str) -> Any:
    return given.get(name, FLAGS[name].default)


def _line(given: Given, key: str, flags: str, value: Any = None, note: str = "") -> RecipeLine:
    """Return a line that came of some flags; of the first one's value where none is given."""
    written = tuple(name for name in flags.split() if name in given.values)
    value = _value(given, flags.split(maxsplit=1)[0]) if value is None else value
    said = "; ".join(filter(None, (note, "" if written else _DEFAULT)))
    return RecipeLine(tuple(key.split(".")), value, written, said)


def _model(given: Given) -> Iterator[Item]:
    if given.get("pretrain") is None:
        raise refuse(given, "pretrain", "no model is named", "--pretrain FOLDER or HUB ID")
    yield _line(
        given,
        "model.name_or_path",
        "pretrain",
        note="OpenRLHF runs code that comes with a model: trust_remote_code: true",
    )
    if openrlhf_flags.dotted(given) or "ds.attn_implementation" in given.values:
        yield _line(given, "model.attn_implementation", "ds.attn_implementation")
    elif given.get("flash_attn") or given.get("packing_samples"):
        yield _line(given, "model.attn_implementation", "flash_attn packing_samples", "flash_attention_2")
    if given.get("ds.experts_implementation"):
        yield _line(given, "model.experts_implementation", "ds.experts_implementation")
    if given.get("use_liger_kernel"):
        yield _line(given, "model.use_kernels", "use_liger_kernel", True, "kernels of the hub in place of Liger's")
    if not given.get("apply_chat_template") or given.get("pretrain_mode"):
        yield RecipeLine(
            ("tokenizer", "add_bos_token"), False, (), "OpenRLHF lets the tokenizer put no token before a text"
        )
    if given.get("disable_fast_tokenizer"):
        yield _line(given, "tokenizer.use_fast", "disable_fast_tokenizer", False)
    if given.get("tokenizer_chat_template"):
        why = "write the template to a file: tokenizer.chat_template: FILE.jinja"
        yield Left("tokenizer_chat_template", why, aloud=True)


def _lora(given: Given) -> Iterator[Item]:
    if _value(given, "lora_rank"):
        yield _line(given, "lora.r", "lora_rank")
        for name, target in (("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
            yield _line(given, f"lora.{target}", name)
        modules = _value(given, "target_modules")
        one = modules[0] if isinstance(modules, list) and len(modules) == 1 else modules
        yield _line(given, "lora.target_modules", "target_modules", one)
    if given.get("load_in_4bit"):
        yield _line(given, "quantization.load_in_4bit", "load_in_4bit")
        for name, value in (("quant_type", "nf4"), ("use_double_quant", True), ("compute_dtype", "bfloat16")):
            yield _line(given, f"quantization.bnb_4bit_{name}", "load_in_4bit", value)


def _data(given: Given) -> Iterator[Item]:
    if given.get("dataset") is None:
        raise refuse(given, "dataset", "no rows are named", "--dataset FILE, FOLDER or HUB ID")
    keys, notes = _layout(given)
    most = given.get("max_samples")
    probs = given.get("dataset_probs", "")
    try:
        shares = [float(share) for share in probs.split(",") if share]
    except ValueError:
        raise refuse(given, "dataset_probs", probs, "numbers with commas between them") from None
    sources = _sources(given.get("dataset"), _value(given, "dataset_split"), keys | {"max_rows": most}, shares)
    if most:
        notes.append(f"OpenRLHF takes the first {most:,} rows, max_rows draws as many")
    if shares:
        notes.append(
            "OpenRLHF draws by --dataset_probs until each was used up; here an epoch has as many rows as all have"
        )
    yield _line(given, "data.train", _ROWS, several(sources), "; ".join(notes))
    if given.get("eval_dataset"):
        held = _sources(given.get("eval_dataset"), _value(given, "eval_split"), keys, [])
        yield _line(given, "data.eval", "eval_dataset eval_split", several(held))
        steps = _value(given, "eval_steps")
        yield _line(given, "train.eval_strategy", "eval_steps", "steps" if steps > 0 else "epoch")
        if steps > 0:
            yield _line(given, "train.eval_steps", "eval_steps")
        yield _line(given, "train.per_device_eval_batch_size", "micro_train_batch_size")
    elif "eval_steps" in given.values:
        yield Left("eval_steps", "OpenRLHF evaluates nothing without --eval_dataset")
    if not given.get("pretrain_mode"):
        whole = given.get("multiturn") and given.get("apply_chat_template")
        on = "assistant" if whole else "last_turn" if given.get("apply_chat_template") else "completion"
        yield _line(given, "data.loss_on", "multiturn", on)
        yield _line(
            given, "train.max_length", "max_len", note="a row whose prompt fills it is dropped there, and counted here"
        )
        yield RecipeLine(
            ("data", "overlong"), "truncate_and_end", (), "OpenRLHF puts the end token in the place of the last token"
        )
    else:
        yield _line(given, "train.max_length", "max_len")


def _layout(given: Given) -> tuple[dict[str, Any], list[str]]:
    """Return the keys of a source that say how its rows become text, and what changed of their meaning."""
    asked, answered = _value(given, "input_key"), _value(given, "output_key")
    if given.get("pretrain_mode"):
        return {"format": "text", "rename": _renames({asked: "text"})}, [
            "OpenRLHF puts no end token after a text, TRL does"
        ]
    if given.get("apply_chat_template"):
        if answered and not given.get("multiturn"):
            return {
                "format": "prompt_completion",
                "rename": _renames({asked: "prompt", answered: "completion"}),
                "wording": "chat",
            }, []
        if answered:
            raise refuse(
                given,
                "output_key",
                f"{answered}, beside --multiturn",
                "the whole chat in one column, under --input_key",
            )
        return {"format": "messages", "rename": _renames({asked: "messages"}), "wording": "chat"}, []
    if not answered:
        found = "not given: OpenRLHF drops every row without an answer"
        raise refuse(given, "output_key", found, "--output_key COLUMN, --apply_chat_template, or --pretrain_mode")
    for name, column in (("input_key", asked), ("output_key", answered)):
        if not column.isidentifier():
            raise refuse(given, name, f"{column}: a column whose name is no word", "the column under another name")
    prompt = _template(given, asked)
    notes = [
        "OpenRLHF puts a space before the end token, so the completion ends in one; line breaks there it takes away"
    ]
    if "\\n" in prompt:
        notes.append("the template holds a backslash and an n, no line break: so the shell passed it")
    return {"wording": {"prompt": prompt, "completion": f"{{{answered}}} "}}, notes


def _template(given: Given, column: str) -> str:
    """Return the prompt's wording: OpenRLHF's template with the column in its place."""
    template = _value(given, "input_template")
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise refuse(given, "input_template", f"{template!r}: {error}", "a text with one {}") from None
    places = [part[1] for part in parts if part[1] is not None]
    if "{}" not in template:
        return f"{{{column}}}"  # OpenRLHF does without such a template
    if places not in ([""], ["0"]):
        raise refuse(given, "input_template", f"{template!r}: {len(places)} places for a prompt", "a text with one {}")
    words = [
        text.replace("{", "{{").replace("}", "}}") + (f"{{{column}}}" if name is not None else "")
        for text, name, _, _ in parts
    ]
    return "".join(words)


def _renames(names: dict[str, str]) -> dict[str, str]:
    return {old: new for old, new in names.items() if old != new}


def _sources(written: str, split: str, keys: dict[str, Any], shares: list[float]) -> list[Any]:
    """Return the sources of a list with commas, as `path@folder` each."""
    found = []
    for number, item in enumerate(written.split(",")):
        path, _, folder = item.strip().partition("@")
        weight = shares[number] if number < len(shares) else None
        found.append(source(path, data_dir=folder, split="" if split == "train" else split, **keys, weight=weight))
    return found


def _optimizer(given: Given) -> Iterator[Item]:
    yield _line(given, "train.learning_rate", "learning_rate")
    yield _line(given, "train.lr_scheduler_type", "lr_scheduler")
    if _value(given, "lr_scheduler") == "cosine_with_min_lr":
        rate = {"min_lr_rate": _value(given, "min_lr_ratio")}
        yield _line(given, "train.lr_scheduler_kwargs", "min_lr_ratio", rate)
    yield _line(given, "train.warmup_steps", "lr_warmup_ratio", note="below 1: a share of all steps")
    if _value(given, "lr_warmup_ratio") >= 1:
        raise refuse(given, "lr_warmup_ratio", f"{_value(given, 'lr_warmup_ratio')}", "a share of the steps, below 1")
    yield _line(given, "train.weight_decay", "l2")
    betas = _value(given, "adam_betas")
    yield _line(given, "train.adam_beta1", "adam_betas", betas[0])
    yield _line(given, "train.adam_beta2", "adam_betas", betas[1])
    if "adam.eps" in given.values:
        yield _line(given, "train.adam_epsilon", "adam.eps")
    yield _line(given, "train.max_grad_norm", "max_norm")
    if _value(given, "optim") != "adam":
        yield Left("optim", "Muon is not built in this version: AdamW trains", aloud=True)
    elif "optim" in given.values:
        yield Left("optim", "AdamW is the default of train.optim too")


def _train(given: Given) -> Iterator[Item]:
    weighs = (
        ""
        if openrlhf_flags.dotted(given)
        else "OpenRLHF up to 0.10 weighs micro batches alike, here all tokens of a step count alike"
    )
    yield _line(given, "run.global_batch_size", "train_batch_size", note=weighs)
    yield _line(given, "train.per_device_train_batch_size", "micro_train_batch_size")
    yield _line(given, "train.num_train_epochs", "max_epochs")
    rest = "what is left of a batch at the end of an epoch makes a smaller step here, and begins the next epoch there"
    yield RecipeLine(("train", "dataloader_drop_last"), True, (), rest)
    yield _line(given, "train.seed", "seed")
    if openrlhf_flags.dotted(given) or given.get("ds.param_dtype"):
        half = _value(given, "ds.param_dtype") == "fp16"
        yield _line(given, "train.bf16", "ds.param_dtype", not half)
        if half:
            yield _line(given, "train.fp16", "ds.param_dtype", True)
    else:
        yield _line(given, "train.bf16", "bf16", bool(given.get("bf16")))
        if not given.get("bf16"):
            yield RecipeLine(
                ("model", "dtype"), "auto", (), "without --bf16 weights are trained in the type that they were saved in"
            )
    yield _line(
        given,
        f"train.{today('gradient_checkpointing')}",
        "gradient_checkpointing",
        bool(given.get("gradient_checkpointing")),
    )
    if given.get("gradient_checkpointing"):
        reentrant = {"use_reentrant": bool(given.get("gradient_checkpointing_use_reentrant"))}
        yield _line(
            given, f"train.{today('gradient_checkpointing_kwargs')}", "gradient_checkpointing_use_reentrant", reentrant
        )
    if given.get("packing_samples"):
        flat = "OpenRLHF lays the rows of a micro batch end to end; packing: true would change how many rows a step has"
        yield _line(given, "train.padding_free", "packing_samples", True, flat)
    for name, target in (("full_determinism", "full_determinism"), ("torch_compile", "torch_compile")):
        if given.get(name):
            yield _line(given, f"train.{target}", name)
    if "data.dataloader_num_workers" in given.values:
        yield _line(given, "train.dataloader_num_workers", "data.dataloader_num_workers")
    if "aux_loss_coef" in given.values:
        yield _line(given, "train.router_aux_loss_coef", "aux_loss_coef")


def _kept(given: Given) -> Iterator[Item]:
    """Yield what is saved and logged."""
    yield _line(given, "train.output_dir", "save_path")
    steps = _value(given, "save_steps")
    yield _line(
        given,
        "train.save_strategy",
        "save_steps",
        "steps" if steps > 0 else "no",
        "" if steps > 0 else "the model at the end alone",
    )
    if steps > 0:
        yield _line(given, "train.save_steps", "save_steps")
        yield _line(given, "train.save_total_limit", "max_ckpt_num")
    if given.get("disable_ds_ckpt"):
        yield _line(given, "train.save_only_model", "disable_ds_ckpt", note="such a checkpoint cannot be gone on from")
    if given.get("load_checkpoint"):
        yield _line(
            given,
            "run.resume",
            "load_checkpoint",
            "auto",
            "" if steps > 0 else "there are no checkpoints to go on from, in OpenRLHF either",
        )
    yield _line(given, "train.logging_steps", "logging_steps")
    trackers = {"use_wandb": "wandb", "use_tensorboard": "tensorboard"}
    if asked := [name for name in trackers if given.get(name)]:
        hidden = "the key belongs in WANDB_API_KEY" if "use_wandb" in asked else "TENSORBOARD_LOGGING_DIR says where"
        yield _line(given, "train.report_to", " ".join(asked), [trackers[name] for name in asked], hidden)
    if given.get("wandb_run_name"):
        yield _line(given, "train.run_name", "wandb_run_name")
