"""What SFTTrainer needs to load the model: the source, quantization, LoRA, an adapter that training continues.

In: a `Run`. Out: a `ModelSource`, before any weight is read, and later the keyword arguments of SFTTrainer.
Errors of the hub, of transformers and of peft become faults with a place and a fix. Deliberately absent: repairs of
upstream's classes (`patches`), and the same model without weights (`meta_model`).
"""

from __future__ import annotations

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

from trl_sft import run_folder
from trl_sft.errors import Fault, MissingPackage, RecipeError, UserError, first_line
from trl_sft.model import model_config, trust
from trl_sft.recipe import hub, paths
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key

_NAME: Key = ("model", "name_or_path")
_HUB_KEYS = (
    "cache_dir",
    "revision",
    "token",
)  # keys of `model:` that are passed on when a file is fetched from the hub
_LONGEST_NAME = 200  # characters of a model's name that a message shows


class ModelSource(NamedTuple):
    """Where a model is, and its configuration."""

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
        problem = f"{name}: exists in the current folder, but a path in a recipe is relative to the recipe"
        fix = f"Write the path relative to the recipe, or write {Path(name).absolute()}."
        raise RecipeError(Fault(where, problem, fix, code="recipe.relative_path"))
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
        problem = f"{name}: its config.json has no `architectures`"
        raise RecipeError(
            Fault(where, problem, "Use a model that `save_pretrained` wrote.", code="model.invalid_config")
        )
    if "config" in run.model:
        config = model_config.apply(run, config)
    return ModelSource(name, adapter, config)


def _base_of_adapter(folder: Path, where: str) -> str:
    """Return the base model that an adapter's folder names. Raises RecipeError if it does not exist."""
    try:
        saved = json.loads((folder / run_folder.ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        problem = f"{folder / run_folder.ADAPTER_CONFIG} is not JSON: {first_line(error)}"
        raise RecipeError(
            Fault(where, problem, "Copy or download the adapter again.", code="model.damaged_file")
        ) from None
    if not isinstance(saved, dict):
        problem = f"{folder / run_folder.ADAPTER_CONFIG} is not a JSON object"
        raise RecipeError(Fault(where, problem, "Copy or download the adapter again.", code="model.damaged_file"))
    name = str(saved.get("base_model_name_or_path") or "")
    if not name or not _may_exist(name):
        shown = f"{name[:_LONGEST_NAME]}..." if len(name) > _LONGEST_NAME else name or "(unnamed)"
        problem = f"{folder}: the base model of this adapter, {shown}, does not exist"
        raise RecipeError(
            Fault(where, problem, "Put the base model at that path, or use another adapter.", code="model.missing_base")
        )
    return name


def _may_exist(name: str) -> bool:
    """Tell whether a name can be a hub id, or a folder that exists."""
    try:
        return Path(name).is_dir() or not Path(name).is_absolute()
    except (OSError, ValueError):  # too long, or with a null character
        return False


def list_tokenizer_sources(source: ModelSource) -> tuple[list[str], int]:
    """Return the places to load the tokenizer from, first choice first, and the vocabulary size of the base model."""
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
        fix = "Install the package that the message names, in this Python environment."
        raise MissingPackage(Fault(where, first_line(error), fix, code="package.missing")) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(
            Fault(
                where, first_line(error), "Write values that peft.LoraConfig takes.", code="recipe.refused_by_library"
            )
        ) from None


def choose_adapter_settings(run: Run) -> dict[Key, Setting]:
    """Return the LoRA settings that the recipe leaves open and this package sets."""
    if run.lora is None or "task_type" in run.lora:
        return {}
    # TRL's command line sets the same value, in `trl.trainer.utils.get_peft_config`
    why = "without it AutoPeftModelForCausalLM cannot load the adapter"
    return {("lora", "task_type"): Setting("CAUSAL_LM", why)}


def make_quantization_config(run: Run, settings: dict[Key, Setting]) -> BitsAndBytesConfig | None:
    """Return the quantization config of a run; None if weights are not quantized.

    Args:
        run: The checked recipe.
        settings: The settings that this package chose, of all sections.

    Raises:
        RecipeError: BitsAndBytesConfig refuses the values.

    """
    if run.quantization is None:
        return None
    where = run.recipe.where(("quantization",))
    defaults = {str(key[-1]): setting.value for key, setting in settings.items() if key[0] == "quantization"}
    try:
        values = defaults | run.quantization
        parameters = inspect.signature(BitsAndBytesConfig).parameters
        for name, value in values.items():
            if type(value) is int and isinstance(parameters[name].default, float):
                values[name] = float(value)  # BitsAndBytesConfig accepts 6.0 and refuses 6
        return BitsAndBytesConfig(**values)
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(
            Fault(
                where,
                first_line(error),
                "Write values that BitsAndBytesConfig takes.",
                code="recipe.refused_by_library",
            )
        ) from None


def check_model(run: Run, source: ModelSource) -> None:
    """Refuse settings that do not fit the weights or the adapter. Raises RecipeError, MissingPackage."""
    make_lora_config(run)
    trust.check_weights(run, [name for name in (source.adapter, source.name) if name])
    check_saved_quantization(run, source)
    check_output_folder(run, source)


def check_saved_quantization(run: Run, source: ModelSource) -> None:
    """Refuse to train, or to quantize again, weights that were saved quantized. Raises RecipeError."""
    saved = getattr(source.config, "quantization_config", None)
    if saved is None:
        return
    method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    problem = f"{source.name} was saved quantized by {getattr(method, 'value', method)}"
    if run.quantization is not None:  # upstream uses the saved quantization and ignores the recipe's
        fix = "Remove `quantization:`, or set model.name_or_path to the model that is not quantized."
        raise RecipeError(Fault(run.recipe.where(("quantization",)), problem, fix, code="model.already_quantized"))
    if run.lora is None and not source.adapter:
        problem += ": its weights cannot be trained"
        raise RecipeError(
            Fault(run.recipe.where(_NAME), problem, "Add `lora: {r: 16}`.", code="model.already_quantized")
        )


def check_output_folder(run: Run, source: ModelSource) -> None:
    """Refuse an output folder that holds the model that training starts from. Raises RecipeError."""
    for name in filter(None, (source.adapter, source.name)):
        if Path(name).is_dir() and Path(name).resolve() == run.output_dir.resolve():
            problem = f"{run.output_dir}: holds the model that training starts from"
            fix = "Set train.output_dir to another folder."
            raise RecipeError(
                Fault(run.recipe.where(("train", "output_dir")), problem, fix, code="run.output_is_model")
            )


def build_trainer_arguments(
    run: Run,
    source: ModelSource,
    *,
    quantization: BitsAndBytesConfig | None,
    new_tokens: Sequence[int],
    vocab_size: int,
) -> dict[str, Any]:
    """Return the keyword arguments of SFTTrainer that define the model.

    SFTTrainer gets the name and loads the model itself. Two cases need the loaded model first: an adapter that training
    continues, and new tokens in the embedding.

    Args:
        run: The checked recipe.
        source: The model.
        quantization: The quantization config; None = weights are not quantized.
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


def add_stop_token(config: GenerationConfig, token: int) -> None:
    """Add a token at which generation stops."""
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in stops:
        config.eos_token_id = [token, *(stop for stop in stops if stop is not None)]


def differs_from_base(run: Run, source: ModelSource, model: PreTrainedModel) -> bool:
    """Tell whether a trained model has other stop tokens, or another number of embedding rows, than its base model."""
    keys = (*_HUB_KEYS, "local_files_only")
    try:
        keywords = {key: value for key, value in run.model.items() if key in keys}
        saved = GenerationConfig.from_pretrained(source.name, **keywords)
    except OSError:  # the model has no generation_config.json
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
    """Resize embedding and head to at least `vocab_size` rows; set the rows of new tokens to the mean of the old rows.

    Upstream's initialization (the same mean with a spread of 1e-9) takes minutes on a CPU for 150,000 rows of 4,096
    values. Rows of reserved tokens are set too, because the base model may never have trained them.
    """
    learned = model.get_input_embeddings().weight.shape[0]
    if vocab_size > learned:
        model.resize_token_embeddings(vocab_size, mean_resizing=False)
    modules = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {
        id(module.weight): module.weight for module in modules if module is not None
    }  # a tied weight counts once
    with torch.no_grad():
        for weight in weights.values():
            weight[list(new_tokens)] = weight[:learned].float().mean(0).to(weight.dtype)


def train_new_rows(run: Run, model: PreTrainedModel, config: Any, *, new_tokens: list[int]) -> None:
    """Let LoRA train the embedding rows of new tokens, unless the recipe trains all rows. Raises RecipeError."""
    if config.trainable_token_indices is not None:
        problem = "trainable_token_indices does not list the new tokens of the chat template"
        where = run.recipe.where(("lora", "trainable_token_indices"))
        raise RecipeError(
            Fault(
                where,
                problem,
                f"Remove the key: the new tokens {new_tokens} are then trained automatically.",
                code="model.new_tokens",
            )
        )
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    paths_of_modules = {id(module): path for path, module in model.named_modules()}
    ends = {}  # last part of a module's path -> the whole path
    for module in (embedding, head):
        path = paths_of_modules[id(module)]
        ends[path.rpartition(".")[2]] = path
    saved_whole = {name for name, path in ends.items() if _is_named(path, config.modules_to_save or ())}
    if saved_whole and len(saved_whole) < len(ends):
        names = ", ".join(sorted(saved_whole))
        problem = f"modules_to_save has {names} only, but new tokens have rows in both {' and '.join(ends)}"
        fix = f"Write modules_to_save: [{', '.join(ends)}], or remove the key; LoRA then trains the new rows."
        raise RecipeError(Fault(run.recipe.where(("lora", "modules_to_save")), problem, fix, code="model.new_tokens"))
    if not saved_whole:
        tied = head.weight is embedding.weight
        config.trainable_token_indices = dict.fromkeys(list(ends)[: 1 if tied else 2], new_tokens)


def _is_named(path: str, names: Sequence[str]) -> bool:
    """Tell whether one of `names` is the end of a module's path, as peft matches them."""
    return any(f".{path}".endswith(f".{name}") for name in names)


def _translate(error: Exception, where: str, name: str) -> UserError:
    """Return an error of the hub or of transformers as a fault of the recipe."""
    refusal = None if Path(name).is_dir() else hub.translate_error(where, name, error)
    if refusal is not None:
        return refusal
    if isinstance(error, errors.EntryNotFoundError):
        return RecipeError(
            Fault(
                where,
                f"{name}: has no config.json",
                "Use a model that transformers can load.",
                code="model.invalid_config",
            )
        )
    if "trust_remote_code" in str(error):
        problem = f"{name}: comes with its own Python code, which is not part of the installed transformers"
        fix = "Read that code and set model.trust_remote_code: true, or use a model that transformers knows."
        return RecipeError(Fault(where, problem, fix, code="model.remote_code"))
    problem = f"{name}: its configuration cannot be read: {first_line(error)}"
    return RecipeError(
        Fault(where, problem, "Use a model that the installed transformers knows.", code="model.invalid_config")
    )
