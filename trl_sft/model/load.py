"""What SFTTrainer needs to load the model: the id, keywords, quantization, LoRA; an adapter to go on with.

In: a `Run`. Out: `Found`, before any weight is read, and later the keyword arguments of SFTTrainer.
Foreign errors of the hub become ours here.
"""

from __future__ import annotations

import functools
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
from trl_sft.recipe import hub
from trl_sft.recipe.checked import Run, Setting
from trl_sft.recipe.yaml_reader import Key


class ModelSource(NamedTuple):
    """A model that exists: its configuration could be read."""

    name: str  # the base model: a folder, or a hub id
    adapter: str  # the adapter that training goes on with; "" = none
    config: PretrainedConfig

    @property
    def shown(self) -> str:
        """How the screen calls it."""
        return f"{self.adapter or self.name} ({self.config.architectures[0]})"


def find(run: Run) -> ModelSource:
    """Return the model of a run without its weights. Raises RecipeError."""
    key = ("model", "name_or_path")
    name, adapter = run.base.name, ""
    if run.base.files and (run.base.files[0] / "adapter_config.json").is_file():
        adapter = name
        saved = json.loads((run.base.files[0] / "adapter_config.json").read_text(encoding="utf-8"))
        name = str(saved.get("base_model_name_or_path") or "")
        if not name or (Path(name).is_absolute() and not Path(name).is_dir()):
            found = f"{run.base.name}: an adapter whose base model {name or '(unnamed)'} is not there"
            raise RecipeError(Fault(run.recipe.where(key), found, "the base at that path, or another adapter"))
    keywords = {k: v for k, v in run.model.items() if k in ("cache_dir", "revision", "token")}
    if not run.base.files and Path(name).exists():
        found = f"{name}: a folder of the current folder, but a path in a recipe is relative to the recipe"
        raise RecipeError(Fault(run.recipe.where(key), found, f"its path from there, or {Path(name).absolute()}"))
    try:
        if not Path(name).is_dir():
            local = bool(run.model.get("local_files_only")) or not hub.ask("model", name, keywords)
            hf_hub_download(name, "config.json", local_files_only=local, **keywords)
        config = AutoConfig.from_pretrained(
            name, trust_remote_code=trust.keywords(run)["trust_remote_code"], **keywords
        )
    except Exception as error:
        raise _refused(run.recipe.where(key), name, error) from None
    if not config.architectures:
        found = f"{name}: its config.json names no architectures"
        raise RecipeError(Fault(run.recipe.where(key), found, "a model that save_pretrained wrote"))
    return ModelSource(name, adapter, config)


def tokenizers(found: ModelSource) -> tuple[list[str], int]:
    """Return where the tokenizer is looked for, first come first served, and how many tokens the base knows."""
    names = [found.adapter, found.name] if found.adapter else [found.name]
    return names, found.config.get_text_config().vocab_size


def lora(run: Run) -> Any:
    """Return the peft.LoraConfig of a run; None for all weights. Raises RecipeError."""
    if run.lora is None:
        return None
    from peft import LoraConfig

    try:
        return LoraConfig(**{str(key[-1]): setting.value for key, setting in settings(run).items()} | run.lora)
    except ImportError as error:
        write = "install what it asks for, in this Python"
        raise MissingPackage(Fault(run.recipe.where(("lora",)), first_line(error), write)) from None
    except (TypeError, ValueError) as error:
        raise RecipeError(Fault(run.recipe.where(("lora",)), first_line(error), "values that peft takes")) from None


def settings(run: Run) -> dict[Key, Setting]:
    """Return what we set for the adapter where the recipe is silent."""
    if run.lora is None or "task_type" in run.lora:
        return {}
    # TRL's own command line sets the same, trl.trainer.utils.get_peft_config
    why = "without it AutoPeftModelForCausalLM cannot load the adapter"
    return {("lora", "task_type"): Setting("CAUSAL_LM", why)}


def quantizes() -> bool:
    """Tell whether the package that quantizes is installed."""
    return importlib.util.find_spec("bitsandbytes") is not None


def quantization(run: Run, settings: dict[Key, Setting]) -> BitsAndBytesConfig | None:
    """Return how the weights are quantized; None where they are not. Raises RecipeError, MissingPackage."""
    if run.quantization is None:
        return None
    where = run.recipe.where(("quantization",))
    if not quantizes():
        write = "pip install 'trl-sft[quantization]', in this Python"
        raise MissingPackage(Fault(where, "bitsandbytes: not installed", write))
    ours = {str(key[-1]): setting.value for key, setting in settings.items() if key[0] == "quantization"}
    try:
        given = ours | run.quantization
        wants = inspect.signature(BitsAndBytesConfig).parameters  # it takes 6.0 and refuses 6
        whole = {n: float(v) for n, v in given.items() if type(v) is int and isinstance(wants[n].default, float)}
        return BitsAndBytesConfig(**given | whole)
    except (TypeError, ValueError, AttributeError) as error:
        raise RecipeError(Fault(where, first_line(error), "values that BitsAndBytesConfig takes")) from None


def check(run: Run, found: ModelSource) -> None:
    """Refuse what the weights or the adapter could not carry out. Raises RecipeError."""
    lora(run)
    trust.check(run, [name for name in (found.adapter, found.name) if name])
    check_quantized(run, found)
    check_output(run, found)


def check_quantized(run: Run, found: ModelSource) -> None:
    """Refuse weights that were saved quantized where they cannot be trained. Raises RecipeError."""
    saved = getattr(found.config, "quantization_config", None)
    if saved is None:
        return
    method = saved.get("quant_method") if isinstance(saved, dict) else saved.quant_method
    named = str(getattr(method, "value", method))
    if run.quantization is not None:  # upstream takes the saved one and drops the recipe's
        told = (
            f"{found.name} was saved quantized by {named}",
            "no `quantization:`, or the model's full weights in model.name_or_path",
        )
        raise RecipeError(Fault(run.recipe.where(("quantization",)), *told))
    if run.lora is None and not found.adapter:
        told = f"{found.name} was saved quantized by {named}: its weights cannot be trained", "lora: {r: 16}"
        raise RecipeError(Fault(run.recipe.where(("model", "name_or_path")), *told))


def check_output(run: Run, found: ModelSource) -> None:
    """Refuse to write over what training starts from. Raises RecipeError."""
    for name in filter(None, (found.adapter, found.name)):
        if Path(name).is_dir() and Path(name).resolve() == run.output_dir.resolve():
            told = f"{run.output_dir}: training starts from the model in it", "another train.output_dir"
            raise RecipeError(Fault(run.recipe.where(("train", "output_dir")), *told))


def arguments(
    run: Run, found: ModelSource, quantized: BitsAndBytesConfig | None, new: Sequence[int], rows: int
) -> dict[str, Any]:
    """Return the keyword arguments of SFTTrainer that bring the model.

    The id goes to SFTTrainer, so that TRL keeps its own loading, except where the model has to be changed
    before: an adapter that training goes on with, or tokens that the model has not learned. `new` are their
    ids, `rows` how many rows the embedding needs.
    """
    peft_config = lora(run)
    if not found.adapter and not new:
        return {"model": found.name, "peft_config": peft_config, "quantization_config": quantized}
    base = create_model_from_path(found.name, **trust.keywords(run), quantization_config=quantized)
    grow(base, rows, new)
    if found.adapter:
        from peft import PeftModel

        return {"model": PeftModel.from_pretrained(base, found.adapter, is_trainable=True)}
    if peft_config is not None:
        train_rows(run, base, peft_config, list(new))
    return {"model": base, "peft_config": peft_config}


def mend(model: PreTrainedModel) -> None:
    """Put right what upstream gets wrong for some models, each silently or at the first step.

    - Single rows of the embedding are trained: peft's wrapper of the head has no `bias`, which TRL's fused
      loss reads, so every step raises (trl 1.16, peft 0.21); and peft would save both embeddings whole
      beside the trained rows.
    - 4-bit weights on a CPU with AVX512-BF16: the first evaluation packs them for a kernel without a
      backward, and they stay so: later gradients were off by up to 106% (bitsandbytes 0.50, docs/development).
    - TRL trains the adapter of quantized weights in bfloat16, but on resuming peft loads it in float32, so
      that a resumed run would end elsewhere than one that was never stopped.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if getattr(model, "peft_config", None) and getattr(model, "is_quantized", False):
        model.load_adapter = functools.partial(model.load_adapter, autocast_adapter_dtype=False)
    head = model.get_output_embeddings()
    if type(head).__name__ == "TrainableTokensWrapper":
        head.bias = head.original_module.bias
        model.save_pretrained = functools.partial(model.save_pretrained, save_embedding_layers=False)


def stop_on(model: PreTrainedModel, token: int) -> None:
    """Have generation stop on a token, beside those that it stops on already."""
    config = model.generation_config
    stops = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if token not in stops:
        config.eos_token_id = [token, *(stop for stop in stops if stop is not None)]


def apart(run: Run, found: ModelSource, model: PreTrainedModel) -> bool:
    """Tell whether a trained model stops on other tokens, or has more of them, than its base as upstream loads it."""
    try:
        keywords = {k: v for k, v in run.model.items() if k in ("cache_dir", "revision", "token", "local_files_only")}
        base = GenerationConfig.from_pretrained(found.name, **keywords)
    except OSError:  # a model without one stops as its config says
        base = GenerationConfig.from_model_config(found.config)
    stops = [config.eos_token_id for config in (base, model.generation_config)]
    sets = [{*stop} if isinstance(stop, list) else {stop} for stop in stops]
    rows = model.get_input_embeddings().weight.shape[0]
    return sets[0] != sets[1] or rows != found.config.get_text_config().vocab_size


def grow(base: PreTrainedModel, rows: int, new: Sequence[int]) -> None:
    """Give the embedding as many rows as it needs, and new tokens the mean of the learned ones.

    Upstream's own start, the same mean with a spread of 1e-9, takes minutes on a CPU for 150,000 rows of
    4,096; and the rows of reserved tokens may never have been trained.
    """
    before = base.get_input_embeddings().weight.shape[0]
    if rows > before:
        base.resize_token_embeddings(rows, mean_resizing=False)
    ends = {
        id(end.weight): end for end in (base.get_input_embeddings(), base.get_output_embeddings()) if end is not None
    }
    with torch.no_grad():
        for end in ends.values():
            end.weight[list(new)] = end.weight[:before].float().mean(0).to(end.weight.dtype)


def train_rows(run: Run, base: PreTrainedModel, config: Any, new: list[int]) -> None:
    """Have LoRA train the rows of new tokens wherever the recipe does not train all rows. Raises RecipeError."""
    if config.trainable_token_indices is not None:
        found = "lora.trainable_token_indices, beside tokens of the chat template that have to be trained too"
        where = run.recipe.where(("lora", "trainable_token_indices"))
        raise RecipeError(Fault(where, found, f"leave it out, or these too: {new}"))
    inside, head = base.get_input_embeddings(), base.get_output_embeddings()
    names = {id(module): name for name, module in base.named_modules()}
    ends = {names[id(end)].rpartition(".")[2]: names[id(end)] for end in (inside, head)}
    kept = {
        end for end, path in ends.items() if any(f".{path}".endswith(f".{m}") for m in config.modules_to_save or ())
    }
    if kept and len(kept) < len(ends):
        found = f"modules_to_save: {', '.join(sorted(kept))} alone, beside new tokens, whose rows lie in the other too"
        write = f"modules_to_save: [{', '.join(ends)}], or without them: the new rows are trained by themselves"
        raise RecipeError(Fault(run.recipe.where(("lora", "modules_to_save")), found, write))
    if not kept:
        tied = head.weight is inside.weight
        config.trainable_token_indices = dict.fromkeys(list(ends)[: 1 if tied else 2], new)


def _refused(where: str, name: str, error: Exception) -> UserError:
    """Return our error for one of the hub or of transformers."""
    told = None if Path(name).is_dir() else hub.refused(where, name, error)
    if told is None and isinstance(error, errors.EntryNotFoundError):
        told = RecipeError(Fault(where, f"{name}: has no config.json", "a model that transformers loads"))
    found = f"{name}: its configuration cannot be read: {first_line(error)}"
    write = "a model that this transformers knows"
    if told is None and "trust_remote_code" in str(error):
        found = f"{name}: brings Python code of its own, which this transformers lacks"
        write = "model.trust_remote_code: true, once you have read that code; or a model that transformers knows"
    return told or RecipeError(Fault(where, found, write))
