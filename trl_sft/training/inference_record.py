"""What run.json records so that the tuned model gets the prompts it was trained on, without recipe and rows.

Inputs: the checked recipe and the inputs of the run. Outputs: a mapping for run.json. Not here: reading it back
(`serving.model_folder`).
"""

from __future__ import annotations

from typing import Any

from trl_sft.model import base_digest
from trl_sft.recipe.checked import Run
from trl_sft.tokenization import special_tokens
from trl_sft.training.stages import TrainingInputs

KEY = "inference"  # in run.json
# keys of `model:` that inference loads the weights with
_MODEL_KEYS = ("dtype", "attn_implementation", "revision", "cache_dir", "local_files_only")


def describe_inference(run: Run, inputs: TrainingInputs) -> dict[str, Any]:
    """Return how prompts are worded and rendered, how answers are decoded, and what the weights are loaded with."""
    source_format = inputs.rows.train.sources[0].source_format
    features = inputs.chat.features
    args = inputs.args
    keywords = {"dtype": "float32"} | {name: run.model[name] for name in _MODEL_KEYS if name in run.model}
    keywords |= run.model.get("config") or {}
    strings = special_tokens.list_strings(inputs.chat.tokenizer)
    entries = {
        "row_type": inputs.rows.row_type,
        "format": source_format.format,
        "wording": source_format.wording,
        "chat_template_kwargs": run.chat_template_kwargs,
        "escape_special_tokens": features.escape_special_tokens,
        "special_tokens_in_prompts": [string for string in strings if string not in features.special_tokens],
        "generation": (run.evaluate or {}).get("generation", {}),
        "seed": args.seed,
        "autocast": "bfloat16" if args.bf16 else "float16" if args.fp16 else None,
        "model": {name: _as_text(value) for name, value in keywords.items()},
        "quantization": inputs.quantization.to_dict() if inputs.quantization is not None else None,
        "new_tokens": list(inputs.chat.new_tokens),
        "base": inputs.model.name,
        "architecture": (inputs.model.config.architectures or [""])[0],
    }
    digest = base_digest.compute_digest(
        inputs.model.name, revision=run.model.get("revision"), cache_dir=run.model.get("cache_dir")
    )
    return {KEY: entries | {"base_digest": digest}}


def _as_text(value: Any) -> Any:
    """Return a value that JSON can hold."""
    return value if isinstance(value, bool | int | float | str | dict | list | None) else str(value)
