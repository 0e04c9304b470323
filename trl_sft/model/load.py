"""What SFTTrainer needs to load the model: the source, quantization, LoRA, an adapter that training continues.

In: a `Run`. Out: a `ModelSource`, before any weight is read, and later the keyword arguments of SFTTrainer.
Errors of the hub, of transformers and of peft become ours here. Deliberately absent: repairs of upstream's classes
(`patches`), and the same model without weights (`meta_model`).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import errors, hf_hub_download
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from trl.trainer.utils import create_model_from_path

from trl_sft.errors import Fault, MissingPackage, RecipeError, UserError, first_line
from trl_sft.model import trust
from trl_sft.recipe import hub, paths
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

_NAME: Key = ("model", "name_or_path")
_HUB_KEYS = ("cache_dir", "revision", "token")  # keys of `model:` that a file of the hub is looked up by


class ModelSource(NamedTuple):
    """A model that exists: its configuration could be read."""

    name: str  # the base model: a folder, or a hub id
    adapter: str  # the adapter that training continues; "" = none
    config: PretrainedConfig

    @property
    def title(self) -> str:
        """The model as the screen names it."""
        return f"{self.adapter or self.name} ({self.config.architectures[0]})"


def find_model(run: Run) -> ModelSource:
    """Find the model of a run and read its configuration, without its weights.

    Raises:
        RecipeError: The model, or the base model of an adapter, does not exist or cannot be read.
        Unreached: The hub cannot be reached.

    """
    where = run.recipe.where(_NAME)
    name, adapter = run.model_location.name, ""
    if run.model_location.files and paths.is_adapter(run.model_location.files[0]):
        adapter = name
        name = _base_of_adapter(run.model_location.files[0], where)
    if not run.model_location.files and Path(name).exists():
        problem = f"{name}: a folder of the current folder, but a path in a recipe is relative to the recipe"
        fix = f"Write its path relative to the recipe, or {Path(name).absolute()}."
        raise RecipeError(Fault(where, problem, fix))
    keywords = {key: value for key, value in run.model.items() if key in _HUB_KEYS}
    try:
        if not Path(name).is_dir():
            offline = bool(run.model.get("local_files_only")) or not hub.check_id("model", name, keywords)
            hf_hub_download(name, "config.json", local_files_only=offline, **keywords)
        trusted = trust.build_load_keywords(run)["trust_remote_code"]
        config = AutoConfig.from_pretrained(name, trust_remote_code=trusted, **keywords)
    except Exception as error:
        raise _translate(error, where, name) from None
    if not config.architectures:
        problem = f"{name}: its config.json names no architectures"
        raise RecipeError(Fault(where, problem, "Name a model that save_pretrained wrote."))
    return ModelSource(name, adapter, config)


def _base_of_adapter(folder: Path, where: str) -> str:
    """Return the base model that an adapter's folder names. Raises RecipeError where it is not there."""
    saved = json.loads((folder / paths.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = str(saved.get("base_model_name_or_path") or "")
    if not name or (Path(name).is_absolute() and not Path(name).is_dir()):
        problem = f"{folder}: an adapter whose base model {name or '(unnamed)'} does not exist"
        raise RecipeError(Fault(where, problem, "Put the base model at that path, or name another adapter."))
    return name


def list_tokenizer_sources(source: ModelSource) -> tuple[list[str], int]:
    """Return where the tokenizer is looked for, in this order, and the size of the base model's vocabulary."""
    names = [source.adapter, source.name] if source.adapter else [source.name]
    return names, source.config.get_text_config().vocab_size


def unwrap_adapter(model: PreTrainedModel) -> PreTrainedModel:
    """Return the model inside peft's wrapper; `model` itself without one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def make_lora_config(run: Run) -> Any:
    """Return the `peft.LoraConfig` of a run; None where all weights are trained.

    Raises:
        RecipeError: peft refuses the values.
        MissingPackage: A value needs a package that is not installed.

    """
    if run.lora is None:
        return None
    from peft import LoraConfig

    defaults = {str(key[-1]): setting.value for key, setting in choose_adapter_settings(run).items()}
    where = run.recipe.where(("lora",))
    try:
        return LoraConfig(**defaults | run.lora)
    except ImportError as error:
        fix = "Install what this message names, in this Python."
        raise MissingPackage(Fault(where, first_line(error), fix)) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(Fault(where, first_line(error), "Write values that peft.LoraConfig takes.")) from None


def choose_adapter_settings(run: Run) -> dict[Key, Setting]:
    """Return what we set for the adapter where the recipe does not."""
    if run.lora is None or "task_type" in run.lora:
        return {}
    # TRL's own command line sets the same, trl.trainer.utils.get_peft_config
    why = "without it AutoPeftModelForCausalLM cannot load the adapter"
    return {("lora", "task_type"): Setting("CAUSAL_LM", why)}


def has_bitsandbytes() -> bool:
    """Tell whether bitsandbytes, which quantizes, is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def make_quantization_config(run: Run, settings: dict[Key, Setting]) -> BitsAndBytesConfig | None:
    """Return how the weights are quantized; None where they are not. `settings` are ours, for all sections.

    Raises:
        RecipeError: BitsAndBytesConfig refuses the values.
        MissingPackage: bitsandbytes is not installed.

    """
    if run.quantization is None:
        return None
    where = run.recipe.where(("quantization",))
    if not has_bitsandbytes():
        fix = "Run `pip install 'trl-sft[quantization]'` in this Python."
        raise MissingPackage(Fault(where, "bitsandbytes is not installed", fix))
    defaults = {str(key[-1]): setting.value for key, setting in settings.items() if key[0] == "quantization"}
    try:
        values = defaults | run.quantization
        parameters = inspect.signature(BitsAndBytesConfig).parameters
        for name, value in values.items():
            if type(value) is int and isinstance(parameters[name].default, float):
                values[name] = float(value)  # it takes 6.0 and refuses 6
        return BitsAndBytesConfig(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(Fault(where, first_line(error), "Write values that BitsAndBytesConfig takes.")) from None


def check_model(run: Run, source: ModelSource) -> None:
    """Refuse what the weights or the adapter cannot do. Raises RecipeError, MissingPackage."""
    make_lora_config(run)
    trust.check_weights(run, [name for name in (source.adapter, source.name) if name])
    check_saved_quantization(run, source)
    check_output_folder(run, source)


def check_saved_quantization(run: Run, source: ModelSource) -> None:
    """Refuse weights that were saved quantized where they cannot be trained. Raises RecipeError."""
    saved = getattr(source.config, "quantization_config", None)
    if saved is None:
        return
    method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    problem = f"{source.name} was saved quantized by {getattr(method, 'value', method)}"
    if run.quantization is not None:  # upstream takes the saved one and drops the recipe's
        fix = "Remove `quantization:`, or name the model with its full weights in model.name_or_path."
        raise RecipeError(Fault(run.recipe.where(("quantization",)), problem, fix))
    if run.lora is None and not source.adapter:
        problem += ": its weights cannot be trained"
        raise RecipeError(Fault(run.recipe.where(_NAME), problem, "Add `lora: {r: 16}`."))


def check_output_folder(run: Run, source: ModelSource) -> None:
    """Refuse to overwrite what training starts from. Raises RecipeError."""
    for name in filter(None, (source.adapter, source.name)):
        if Path(name).is_dir() and Path(name).resolve() == run.output_dir.resolve():
            problem = f"{run.output_dir}: training starts from the model in it"
            fix = "Write another folder in train.output_dir."
            raise RecipeError(Fault(run.recipe.where(("train", "output_dir")), problem, fix))


def build_trainer_arguments(
    run: Run,
    source: ModelSource,
    *,
    quantization: BitsAndBytesConfig | None,
    new_tokens: Sequence[int],
    vocab_size: int,
) -> dict[str, Any]:
    """Return the keyword arguments of SFTTrainer that bring the model.

    SFTTrainer gets the id, so that TRL keeps its own loading, except where the model has to change before: an adapter
    that training continues, or tokens that the model has not learned.

    Args:
        run: The checked recipe.
        source: The model.
        quantization: How its weights are quantized; None = not at all.
        new_tokens: Ids of tokens that the model has not learned.
        vocab_size: How many rows the embedding needs.

    Returns:
        `model` and, as far as they apply, `peft_config` and `quantization_config`.

    """
    peft_config = make_lora_config(run)
    if not source.adapter and not new_tokens:
        return {"model": source.name, "peft_config": peft_config, "quantization_config": quantization}
    model = create_model_from_path(source.name, **trust.build_load_keywords(run), quantization_config=quantization)
    add_embedding_rows(model, vocab_size, new_tokens)
    if source.adapter:
        from peft import PeftModel

        return {"model": PeftModel.from_pretrained(model, source.adapter, is_trainable=True)}
    if peft_config is not None:
        train_new_rows(run, model, peft_config, new_tokens=list(new_tokens))
    return {"model": model, "peft_config": peft_config}


def add_stop_token(model: PreTrainedModel, token: int) -> None:
    """Have generation stop at one more token."""
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in stops:
        config.eos_token_id = [token, *(stop for stop in stops if stop is not None)]


def differs_from_base(run: Run, source: ModelSource, model: PreTrainedModel) -> bool:
    """Tell whether a trained model stops at other tokens, or has more of them, than its base as upstream loads it."""
    keys = (*_HUB_KEYS, "local_files_only")
    try:
        keywords = {key: value for key, value in run.model.items() if key in keys}
        saved = GenerationConfig.from_pretrained(source.name, **keywords)
    except OSError:  # a model without one stops as its config says
        saved = GenerationConfig.from_model_config(source.config)
    rows = model.get_input_embeddings().weight.shape[0]
    if rows != source.config.get_text_config().vocab_size:
        return True
    return _stop_tokens(saved) != _stop_tokens(model.generation_config)


def _stop_tokens(config: GenerationConfig) -> set[int | None]:
    """Return the tokens at which generation stops."""
    stops = config.eos_token_id
    return {*stops} if isinstance(stops, list) else {stops}


def add_embedding_rows(model: PreTrainedModel, vocab_size: int, new_tokens: Sequence[int]) -> None:
    """Give the embedding at least `vocab_size` rows, and the rows of new tokens the mean of the learned ones.

    Upstream's own start, the same mean with a spread of 1e-9, takes minutes on a CPU for 150,000 rows of 4,096
    values; and the rows of reserved tokens may never have been trained.
    """
    learned = model.get_input_embeddings().weight.shape[0]
    if vocab_size > learned:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(module.weight): module.weight for module in modules if module is not None}  # tied ones once
    with torch.no_grad():
        for weight in weights.values():
            weight[list(new_tokens)] = weight[:learned].float().mean(0).to(weight.dtype)


def train_new_rows(run: Run, model: PreTrainedModel, config: Any, *, new_tokens: list[int]) -> None:
    """Have LoRA train the rows of new tokens wherever the recipe does not train all rows. Raises RecipeError."""
    if config.trainable_token_indices is not None:
        problem = "lora.trainable_token_indices, beside tokens of the chat template that have to be trained too"
        where = run.recipe.where(("lora", "trainable_token_indices"))
        raise RecipeError(Fault(where, problem, f"Remove it, or add these: {new_tokens}."))
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths_of_modules = {id(module): path for path, module in model.named_modules()}
    ends = {}  # last part of the module's name -> its whole path
    for module in (embedding, head):
        path = paths_of_modules[id(module)]
        ends[path.rpartition(".")[2]] = path
    saved_whole = {name for name, path in ends.items() if _is_named(path, config.modules_to_save or ())}
    if saved_whole and len(saved_whole) < len(ends):
        names = ", ".join(sorted(saved_whole))
        problem = f"modules_to_save: {names} alone, beside new tokens, whose rows lie in the other too"
        fix = f"Write modules_to_save: [{', '.join(ends)}], or remove it: the new rows are trained by themselves."
        raise RecipeError(Fault(run.recipe.where(("lora", "modules_to_save")), problem, fix))
    if not saved_whole:
        tied = head.weight is embedding.weight
        config.trainable_token_indices = dict.fromkeys(list(ends)[: 1 if tied else 2], new_tokens)


def _is_named(path: str, names: Sequence[str]) -> bool:
    """Tell whether one of `names` is the end of a module's path, as peft matches them."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def _translate(error: Exception, where: str, name: str) -> UserError:
    """Return our error for one of the hub or of transformers."""
    refusal = None if Path(name).is_dir() else hub.translate_error(where, name, error)
    if refusal is not None:
        return refusal
    if isinstance(error, errors.EntryNotFoundError):
        return RecipeError(Fault(where, f"{name}: has no config.json", "Name a model that transformers loads."))
    if "trust_remote_code" in str(error):
        problem = f"{name}: brings Python code of its own, which this transformers lacks"
        fix = "Read that code, then write model.trust_remote_code: true; or name a model that transformers knows."
        return RecipeError(Fault(where, problem, fix))
    problem = f"{name}: its configuration cannot be read: {first_line(error)}"
    return RecipeError(Fault(where, problem, "Name a model that this version of transformers knows."))
