"""What a run believes of others: code that a recipe or a model brings, weights as pickles, and where tokens end up.

In: the checked recipe. Out: lines for the screen before anything of it runs, keywords of `from_pretrained`, refusals,
arguments that can be written down. Deliberately absent: reading anything; upstream reads checkpoints' states, as data
alone (`torch.load(weights_only=True)`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trl import SFTConfig

from trl_sft import console
from trl_sft.errors import LEFT_OUT, Fault, RecipeError
from trl_sft.recipe import hub
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

_CODE, _PLAIN = "trust_remote_code", "use_safetensors"
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin")


def begin(run: Run) -> None:
    """Send nothing home, and say what code will run and which pickles will be read, before they are."""
    hub.no_telemetry()
    for name, value in said(run):
        console.say(f"{name:<9} {value}")


def said(run: Run) -> list[tuple[str, str]]:
    """Return what the screen says of code and pickles."""
    lines = [
        ("code", f"runs Python that {run.base.name} brings ({section}.{_CODE})")
        for section, values in (("model", run.model), ("tokenizer", run.tokenizer))
        if values.get(_CODE)
    ]
    kernels = run.model.get("attn_implementation", "")
    if "/" in kernels:
        lines.append(("code", f"runs kernels of {kernels} (model.attn_implementation)"))
    if run.model.get("use_kernels"):
        lines.append(("code", "runs kernels of the hub (model.use_kernels)"))
    codes = {source.code: source for part in run.sources.values() for source in part if source.code}
    lines += [("code", f"runs {code.file}: {code.name} formats {source.name}") for code, source in codes.items()]
    if run.model.get(_PLAIN) is False:
        lines.append(("weights", f"of {run.base.name} are read as pickles too (model.{_PLAIN}: false)"))
    return lines


def keywords(run: Run) -> dict[str, Any]:
    """Return the recipe's keywords of `from_pretrained`; without a word of it no code and no pickle is loaded.

    Upstream asks on the terminal where it is told neither, and takes pickles where there is nothing else.
    """
    return {_CODE: False} | {str(key[-1]): setting.value for key, setting in settings(run).items()} | run.model


def settings(run: Run) -> dict[Key, Setting]:
    """Return what we set where the recipe is silent: weights come as safetensors."""
    if _PLAIN in run.model:
        return {}
    return {("model", "use_safetensors"): Setting(True, "a pickle may run code when it is read")}


def check(run: Run, folders: list[str]) -> None:
    """Refuse weights on this machine that are there as a pickle alone. Raises RecipeError."""
    for folder in filter(Path.is_dir, map(Path, folders)):
        pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
        if pickles and not any(folder.glob("*.safetensors")) and run.model.get(_PLAIN) is not False:
            found = f"{folder}: its weights are a pickle ({pickles[0]}), which may run code when it is read"
            write = f"a folder with safetensors; or model.{_PLAIN}: false, where you trust who made it"
            raise RecipeError(Fault(run.recipe.where(("model", "name_or_path")), found, write))


class Hidden(str):
    """A token that works as it is and is written down without its letters.

    The Trainer pickles its arguments into every checkpoint.
    """

    def __reduce__(self) -> tuple[type[str], tuple[str]]:
        """Pickle as the words that stand in its place."""
        return str, (LEFT_OUT,)

    def __deepcopy__(self, _: Any) -> Hidden:
        """Copy as it is: a copy in this process still has to work."""
        return self


def hide(args: SFTConfig) -> None:
    """Keep tokens out of what upstream writes of its arguments; the model is loaded, so its own is used up."""
    args.model_init_kwargs = {k: v for k, v in (args.model_init_kwargs or {}).items() if k != "token"} or None
    if isinstance(args.hub_token, str):
        args.hub_token = Hidden(args.hub_token)
