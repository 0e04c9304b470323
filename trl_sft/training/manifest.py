"""The contents of run.json and of the model card.

In: the run, the settings that this package chose, live arguments. Out: texts and mappings, without secrets; `record`
and `finish` write them. Deliberately absent: resolved.yaml (`recipe.resolved`).
"""

from __future__ import annotations

import dataclasses
import enum
import math
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trl_sft import __version__, run_folder
from trl_sft.model import device
from trl_sft.recipe import yaml_reader
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.upstream import packages
from trl_sft.recipe.yaml_reader import Key, format_value
from trl_sft.training.git_commit import find_commit

_PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch", "tokenizers")
_COMPUTING = {  # what a number of a run depends on, in `describe_environment`
    "versions": ("trl", "transformers", "peft", "accelerate", "torch", "bitsandbytes"),
    "hardware": ("device", "gpus", "cpu", "threads"),
}
_METRICS_OF_CARD = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
# keys of SFTConfig that the run sets from other sections of the recipe
_FROM_OTHER_SECTIONS = ("output_dir", "model_init_kwargs", "completion_only_loss", "assistant_only_loss")


def describe_start(run: Run, chosen: Mapping[Key, Setting], args: Any) -> dict[str, Any]:
    """Return run.json as it stands when training starts.

    Args:
        run: the checked recipe.
        chosen: values that this package set.
        args: the live SFTConfig.
    """
    written = {*run.train, *(key[-1] for key in chosen), *_FROM_OTHER_SECTIONS}
    defaults = [field.name for field in dataclasses.fields(args) if field.name not in written]
    return {
        "trl_sft": __version__,
        **describe_environment(run),
        "git_commit": find_commit(run.recipe.path.parent),
        "seed": args.seed,
        "defaults": {name: _as_json(getattr(args, name)) for name in defaults if not name.endswith("token")},
        "outcome": run_folder.RUNNING,
    }


def describe_environment(run: Run) -> dict[str, Any]:
    """Return versions of packages, and the machine: on others the same run may have other last digits."""
    names = _PACKAGES if run.quantization is None else (*_PACKAGES, "bitsandbytes")
    versions = {name: packages.get_version(name) for name in names}
    return {"versions": versions, "hardware": device.describe_hardware()}


def list_environment_changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return the packages and parts of the machine that compute and that differ, each with both values.

    Args:
        before: what `describe_environment` returned, or what a file holds of it.
        now: the same of this process.

    """
    changes = []
    for section, names in _COMPUTING.items():
        for name in names:
            earlier, current = before.get(section, {}).get(name), now[section].get(name)
            if earlier is not None and earlier != current:
                changes.append(f"{name} {_write_list(earlier)} -> {_write_list(current)}")
    return changes


def _write_list(value: Any) -> str:
    """Return a value, or the values of a list with commas."""
    return (", ".join(value) or "none") if isinstance(value, list) else str(value)


def write_usage(folder: str, *, differs_from_base: bool) -> list[str]:
    """Return the lines of Python that make `ask`, a text-generation pipeline, from the folder of a finished run.

    Args:
        folder: the run folder, as the reader's Python finds it.
        differs_from_base: whether it holds an adapter whose tokens or end token are not its base's. transformers
            loads an adapter with the base's tokens, so peft has to grow the embedding and generation has to be told
            where to stop.
    """
    if not differs_from_base:
        return ["from transformers import pipeline", f'ask = pipeline("text-generation", {format_value(folder)})']
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig, pipeline",
        f"folder = {format_value(folder)}",
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'ask = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))',
    ]


def describe_best(args: Any, state: Any) -> dict[str, Any] | None:
    """Return the step whose weights the Trainer loaded at the end, for run.json; None = those of the last step.

    Args:
        args: the live SFTConfig.
        state: the Trainer's state after training.

    Returns:
        `step`, `steps` (of the run), `metric` (as it is logged) and its `value`.
    """
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    name = str(args.metric_for_best_model or "loss")
    metric = name if name.startswith("eval_") else f"eval_{name}"
    step = int(Path(state.best_model_checkpoint).name.removeprefix(run_folder.CHECKPOINT))
    return {"step": step, "steps": state.global_step, "metric": metric, "value": state.best_metric}


def write_best(best: Mapping[str, Any]) -> str:
    """Return the line that says which step was saved; `best` is that of `describe_best`."""
    return f"step {best['step']} of {best['steps']} ({best['metric']} {best['value']:.4g}), whose weights are saved"


def write_merge(run: Run) -> list[str]:
    """Return the lines of Python that merge the adapter of a finished run into its base model.

    peft saves no generation config, and the merged model would have that of the base, which may end a turn with
    another token.
    """
    dtype = run.model.get("dtype", "float32")
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig",
        f"folder = {format_value(run.output_dir.name)}",
        f'model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="{dtype}").merge_and_unload()',
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'model.save_pretrained("merged")',
        'AutoTokenizer.from_pretrained(folder).save_pretrained("merged")',
    ]


def write_model_card(
    run: Run,
    base: str,
    metrics: Mapping[str, float],
    *,
    is_adapter: bool,
    differs_from_base: bool,
    outcome: Sequence[str],
) -> str:
    """Return the model card; TRL's own names neither a local base nor results.

    Args:
        run: the checked recipe.
        base: the base model's folder or hub id.
        metrics: of the last evaluation, as the Trainer names them.
        is_adapter: whether the folder holds an adapter.
        differs_from_base: as in `write_usage`.
        outcome: lines on what came out: the verdict, and the step whose weights are saved.
    """
    is_local = Path(base).is_absolute()
    name = Path(base).name if is_local else base
    header = {"library_name": "peft" if is_adapter else "transformers", "pipeline_tag": "text-generation"}
    header |= {} if is_local else {"base_model": base}
    values = [f"| {key.removeprefix('eval_')} | {metrics[key]:.4g} |" for key in metrics if key in _METRICS_OF_CARD]
    results = ["| metric on held-out rows | value |", "|---|---|", *values] if values else ["No rows were held out."]
    recipe = yaml_reader.mask_secrets(run.recipe.text).rstrip()
    overrides = " ".join(run.recipe.arguments[1:])
    versions = ", ".join(f"{package} {packages.get_version(package)}" for package in _PACKAGES)
    lines = ["---", *(f"{key}: {format_value(value)}" for key, value in header.items()), "tags: [trl, sft, trl_sft]"]
    lines += ["---", "", f"# {run.output_dir.name}", ""]
    lines += [f"`{name}`, {'with LoRA' if is_adapter else 'all weights'} fine-tuned by trl_sft {__version__}."]
    lines += ["", "## Results", ""]
    for line in filter(None, outcome):
        lines += [line, ""]
    lines += [*results, "", "## Use", ""]
    lines += ["```sh", f"python -m trl_sft chat {shlex.quote(run.output_dir.name)}", "```", ""]
    lines += [f"`{run.output_dir.name}` is this folder. Without trl_sft:", ""]
    lines += ["```python", *write_usage(run.output_dir.name, differs_from_base=differs_from_base), "```", ""]
    if is_adapter:
        lines += ["To merge the adapter into the base model, with the tokens that generation stops on:", ""]
        lines += ["```python", *write_merge(run), "```", ""]
    lines += ["## Recipe", "", "```yaml", recipe, "```"]
    lines += ["", f"Overrides: `{overrides}`"] if overrides else []
    return "\n".join([*lines, "", f"Versions: {versions}.", ""])


def _as_json(value: Any) -> Any:
    """Return a value that JSON can hold: enumerations by value, what is not finite and objects as text."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
