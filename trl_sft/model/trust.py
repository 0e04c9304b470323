"""Policy for remote code, pickle files and secrets.

In: the checked recipe. Out: lines for the screen before foreign code runs, keyword arguments of `from_pretrained`,
faults for pickle files, and training arguments without a hub token. Deliberately absent: reading checkpoints; upstream
reads them without running code (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTConfig

from trl_sft import console, redaction
from trl_sft.errors import Fault, RecipeError
from trl_sft.recipe import hub
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

_REMOTE_CODE, _SAFETENSORS = "trust_remote_code", "use_safetensors"
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


def announce(run: Run) -> None:
    """Turn telemetry off, and print which foreign code will run and which pickle files will be read."""
    hub.disable_telemetry()
    for name, value in describe_code(run):
        console.say(f"{name:<9} {value}")


def describe_code(run: Run) -> list[tuple[str, str]]:
    """Return the lines of the screen about code and pickle files: (name, text) each."""
    lines = []
    for section, values in (("model", run.model), ("tokenizer", run.tokenizer)):
        if values.get(_REMOTE_CODE):
            lines.append(("code", f"runs Python code of {run.model_location.name} ({section}.{_REMOTE_CODE})"))
    attention = run.model.get("attn_implementation", "")
    if "/" in attention:
        lines.append(("code", f"runs kernels of {attention} (model.attn_implementation)"))
    if run.model.get("use_kernels"):
        lines.append(("code", "runs kernels of the hub (model.use_kernels)"))
    functions = {source.function: source for part in run.sources.values() for source in part if source.function}
    lines += [("code", f"runs {code.file}: {code.name} formats {source.name}") for code, source in functions.items()]
    if run.model.get(_SAFETENSORS) is False:
        lines.append(
            ("weights", f"of {run.model_location.name} may be read from pickle files (model.{_SAFETENSORS}: false)")
        )
    return lines


def build_load_keywords(run: Run) -> dict[str, Any]:
    """Return the keyword arguments of `from_pretrained`. Foreign code and pickles need the recipe's permission.

    Upstream would ask on the terminal if `trust_remote_code` is not set, and would read a pickle if there is no other
    file.
    """
    defaults = {str(key[-1]): setting.value for key, setting in choose_weight_settings(run).items()}
    keywords = {name: value for name, value in run.model.items() if name != "config"}
    return {_REMOTE_CODE: False} | defaults | keywords | (run.model.get("config") or {})


def choose_weight_settings(run: Run) -> dict[Key, Setting]:
    """Return `model.use_safetensors: true`, unless the recipe sets the key."""
    if _SAFETENSORS in run.model:
        return {}
    return {("model", "use_safetensors"): Setting(True, "a pickle may run code when it is read")}


def check_weights(run: Run, folders: list[str]) -> None:
    """Refuse local folders whose weights are stored only as pickles. Raises RecipeError."""
    if run.model.get(_SAFETENSORS) is False:
        return
    for folder in filter(Path.is_dir, map(Path, folders)):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors")):
            problem = f"{folder}: its weights are a pickle ({pickles[0]}), which may run code when it is read"
            fix = f"Use a folder with safetensors. If you trust its author, set model.{_SAFETENSORS}: false."
            raise RecipeError(
                Fault(run.recipe.where(("model", "name_or_path")), problem, fix, code="model.pickled_weights")
            )


class HiddenToken(str):
    """A text with a secret that is usable in this process and never pickled: the Trainer pickles its arguments."""

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickle the text without the secret."""
        return str, (redaction.redact(self),)

    def __deepcopy__(self, _: Any) -> HiddenToken:
        """Return the token itself: a copy in this process must stay usable."""
        return self


def hide_tokens(args: SFTConfig) -> None:
    """Keep tokens and other secrets out of the files into which upstream writes its arguments.

    Call this function after the model is loaded; the token for loading is then no longer needed.
    """
    args.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "token"} or None
    for name, value in vars(args).items():
        setattr(args, name, _hide(value))


def _hide(value: Any) -> Any:
    """Return a value whose texts with a secret are `HiddenToken`s."""
    if type(value) is str and redaction.redact(value) != value:
        return HiddenToken(value)
    if type(value) is dict:
        return {name: _hide(inner) for name, inner in value.items()}
    return [_hide(inner) for inner in value] if type(value) is list else value
