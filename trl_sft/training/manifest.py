"""What a run leaves in writing: run.json and the model card; whether its folder may be used.

In: the run, what the machine made us set, live arguments. Out: texts and mappings for `run_folder`.
Secrets stand in none of them. Not here: `resolved.yaml` (see `recipe.resolved`).
"""

from __future__ import annotations

import dataclasses
import enum
import math
import subprocess
from pathlib import Path
from typing import Any

from trl_sft import __version__, run_folder
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import resolved
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.upstream import packages
from trl_sft.recipe.yaml_reader import Key, format_value

_PACKAGES = ("trl", "transformers", "datasets", "peft", "accelerate", "torch", "tokenizers")
_HELD_OUT = ("eval_loss", "eval_mean_token_accuracy", "eval_entropy")
# keys of SFTConfig that the run sets from other sections of the recipe
_OURS = ("output_dir", "model_init_kwargs", "completion_only_loss", "assistant_only_loss")


def claimed(run: Run) -> run_folder.Claim:
    """Decide whether the run begins, goes on or is refused, by what its folder holds. Raises RecipeError."""
    claim = run_folder.claim(
        run.output_dir, resolved.compute_fingerprint(run), lambda: resolved.hash_files(run), run.options
    )
    if claim.problem:
        raise RecipeError(Fault(run.recipe.where(claim.key), claim.problem, claim.fix))
    return claim


def beginning(run: Run, settings: dict[Key, Setting], args: Any) -> dict[str, Any]:
    """Return run.json as it stands when training starts; `args` are the live SFTConfig."""
    from trl_sft.model import device

    ours = {*run.train, *(key[-1] for key in settings), *_OURS}
    rest = [field.name for field in dataclasses.fields(args) if field.name not in ours]
    return {
        "trl_sft": __version__,
        "versions": {package: packages.get_version(package) for package in _packages(run)},
        "fingerprint": resolved.compute_fingerprint(run),
        "git_commit": _commit(run.recipe.path.parent),
        "data": resolved.hash_files(run),
        "hardware": device.describe_hardware(),
        "seed": args.seed,
        "defaults": {name: _plain(getattr(args, name)) for name in rest if not name.endswith("token")},
        "outcome": run_folder.RUNNING,
    }


def _packages(run: Run) -> tuple[str, ...]:
    return _PACKAGES if run.quantization is None else (*_PACKAGES, "bitsandbytes")


def usage(folder: str, apart: bool) -> list[str]:
    """Return the lines of Python that make `ask` from a folder of a finished run.

    `apart`: an adapter whose tokens or end token differ from its base's. transformers loads an adapter with
    the base's, so peft has to grow the embedding, and generation has to be told where to stop.
    """
    if not apart:
        return ["from transformers import pipeline", f'ask = pipeline("text-generation", {format_value(folder)})']
    return [
        "from peft import AutoPeftModelForCausalLM",
        "from transformers import AutoTokenizer, GenerationConfig, pipeline",
        f"folder = {format_value(folder)}",
        "model = AutoPeftModelForCausalLM.from_pretrained(folder)",
        "model.generation_config = GenerationConfig.from_pretrained(folder)",
        'ask = pipeline("text-generation", model, tokenizer=AutoTokenizer.from_pretrained(folder))',
    ]


def card(run: Run, base: str, adapter: bool, metrics: dict[str, float], apart: bool) -> str:
    """Return the model card; `base` is the model's folder or hub id. TRL's names neither a local base nor results.

    `apart` as in `usage`.
    """
    header = {"library_name": "peft" if adapter else "transformers", "pipeline_tag": "text-generation"}
    if not Path(base).is_absolute():
        header["base_model"] = base
    held = [f"| {name.removeprefix('eval_')} | {value:.4g} |" for name, value in metrics.items() if name in _HELD_OUT]
    results = ["| on held-out rows | value |", "|---|---|", *held] if held else ["No rows were held out."]
    versions = ", ".join(f"{package} {packages.get_version(package)}" for package in _PACKAGES)
    name = Path(base).name if Path(base).is_absolute() else base
    return "\n".join(
        [
            *(
                "---",
                *(f"{name}: {format_value(value)}" for name, value in header.items()),
                "tags: [trl, sft, trl_sft]",
                "---",
            ),
            *("", f"# {run.output_dir.name}", ""),
            f"`{name}`, {'with LoRA' if adapter else 'all weights'} fine-tuned by trl_sft {__version__}.",
            *("", "## Results", "", *results),
            *("", "## Use", "", "```python", *usage(run.output_dir.name, apart), "```", ""),
            *(
                "`" + run.output_dir.name + "` is this folder.",
                "",
                "## Recipe",
                "",
                "```yaml",
                resolved.remove_secrets(run, run.recipe.text).rstrip(),
                "```",
            ),
            *(
                ["", f"Overrides: `{resolved.remove_secrets(run, ' '.join(given))}`"]
                if (given := run.recipe.arguments[1:])
                else []
            ),
            *("", f"Versions: {versions}.", ""),
        ]
    )


def _commit(folder: Path) -> str | None:
    """Return the commit of the recipe's repository, with + where files differ from it; None outside one."""
    try:
        command = ["git", "-C", str(folder), "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool | dict | None) else str(value)
