"""Merges an adapter into one module of its base model at a time, by peft's own layers.

Inputs: the base model on torch's meta device, the folder of the adapter, a function that reads a tensor of the base.
Outputs: the merged tensors of one module. Only the adapter's own tensors are in memory; of the base model one module
is. peft computes the sum, so LoRA, rsLoRA, DoRA, biases, embeddings, rows of new tokens, whole modules and parameters
of experts are merged as peft merges them. Deliberately not here: files (`merge`).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from trl_sft import run_folder
from trl_sft.errors import Fault, RecipeError, first_line
from trl_sft.serving import base_tensors

_UNSUPPORTED = "merge.unsupported"
_PLAIN_STARTS = (True, False, "gaussian", "eva")  # values of `init_lora_weights` that leave the base's weights alone


class AdaptedModule(NamedTuple):
    """A module of the base model that the adapter changes."""

    path: str  # in the base model: `model.layers.0.self_attn.q_proj`
    module: nn.Module  # peft's wrapper


def check_mergeable(base: Path, adapter: Path, rows: int, *, fields: Mapping[str, Any]) -> PreTrainedModel:
    """Merge the adapter without values, so that what peft refuses is refused before a file is written.

    Args:
        base: The folder of the base model.
        adapter: The folder of the adapter.
        rows: Of the embedding with the adapter.
        fields: Of the base model's configuration, which the run set by `model.config`.

    Returns:
        The merged model on the meta device: its names and shapes.

    Raises:
        RecipeError: peft cannot merge this kind of adapter.

    """
    _check_kind(adapter)
    config = read_config(adapter)
    for name in ("alora_invocation_tokens", "arrow_config", "layer_replication"):
        if getattr(config, name, None):
            _refuse(adapter, f"an adapter with `{name}` cannot be merged: it is no sum of the base's weights")
    config.init_lora_weights = False  # the values come from the file
    if getattr(config, "bias", "none") != "none":
        _refuse(adapter, f"`bias: {config.bias}` is not merged by this command: peft trains the base's own biases")
    model = base_tensors.load_on_meta(base, fields)
    resize(model, rows)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft's note on weights that are no longer tied; `merge` says it
            merged = PeftModel(model, config, low_cpu_mem_usage=True).merge_and_unload()
    except Exception as error:  # peft raises ValueError, RuntimeError, NotImplementedError, AttributeError
        _refuse(adapter, f"peft cannot merge this adapter: {first_line(error)}")
    return merged


def _check_kind(adapter: Path) -> None:
    """Refuse an adapter that is no LoRA on the base's own weights, by the words of its file. Raises RecipeError.

    The file is read as it stands: peft refuses some of these kinds with a message about its own arguments.
    """
    values = run_folder.read_json(adapter / run_folder.ADAPTER_CONFIG)
    kind, start = values.get("peft_type", "LORA"), values.get("init_lora_weights", True)
    if kind != "LORA":
        _refuse(adapter, f"an adapter of the kind {kind} is not merged by this command, which merges LoRA")
    if start not in _PLAIN_STARTS:
        text = f"an adapter with `init_lora_weights: {start}` is not merged by this command"
        _refuse(adapter, f"{text}: it starts from changed base weights")


def read_config(adapter: Path) -> Any:
    """Return the configuration of an adapter. Raises RecipeError if peft cannot read it."""
    try:
        return PeftConfig.from_pretrained(str(adapter))
    except (ValueError, TypeError, KeyError, OSError) as error:
        problem = f"the configuration of the adapter cannot be read: {first_line(error)}"
        raise RecipeError(
            Fault(str(adapter), problem, "Restore the file from a copy.", code="merge.damaged_adapter")
        ) from None


def resize(model: PreTrainedModel, rows: int) -> None:
    """Give the embedding and the head of a model on the meta device the number of rows that the adapter needs."""
    if rows != model.get_input_embeddings().weight.shape[0]:
        with torch.device("meta"):
            model.resize_token_embeddings(rows, mean_resizing=False)


def _refuse(adapter: Path, problem: str) -> None:
    """Raise RecipeError for a kind of adapter that is not merged."""
    fix = "Use the adapter on its base model, without merging."
    raise RecipeError(Fault(str(adapter), problem, fix, code=_UNSUPPORTED))


class AdapterLayers:
    """peft's layers with the adapter's tensors, over a base model without values."""

    def __init__(self, base: Path, adapter: Path, rows: int, *, fields: Mapping[str, Any]) -> None:
        """Load the adapter. Raises RecipeError if its files do not fit the base model."""
        model = base_tensors.load_on_meta(base, fields)
        resize(model, rows)
        config = read_config(adapter)
        config.init_lora_weights = False  # the values come from the file
        peft_model = PeftModel(model, config, low_cpu_mem_usage=True)
        for module in peft_model.modules():  # peft 0.21 moves what it has loaded to the device of the base: meta
            if hasattr(module, "_move_adapter_to_device_of_base_layer"):
                module._move_adapter_to_device_of_base_layer = _stay
        try:
            report = peft_model.load_adapter(str(adapter), "default", torch_device="cpu", low_cpu_mem_usage=True)
        except Exception as error:  # safetensors and torch have many kinds
            problem = f"the adapter does not fit its base model: {first_line(error)}"
            raise RecipeError(
                Fault(str(adapter), problem, "Copy or train the adapter again.", code="merge.damaged_adapter")
            ) from None
        unread = [*report.unexpected_keys, *(key for key in report.missing_keys if "lora_" in key)]
        if unread:
            problem = f"the adapter does not fit its base model: {unread[0]} and {len(unread) - 1:,} more tensors"
            raise RecipeError(
                Fault(str(adapter), problem, "Copy or train the adapter again.", code="merge.damaged_adapter")
            )
        self._root: nn.Module = peft_model.base_model.model
        self.modules = list(_list_adapted("", self._root))
        _check_loaded(self.modules)
        self._stored = {
            name: parameter.detach()
            for name, parameter in self._root.named_parameters(remove_duplicate=False)
            if not parameter.is_meta
        }

    def find_stored(self, name: str) -> torch.Tensor | None:
        """Return a tensor of the base that the adapter's file replaces, as an embedding with new rows; None = none."""
        return self._stored.get(name)

    def merge(
        self, adapted: AdaptedModule, names: list[str], read: Callable[[str], torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Return the merged tensors of a module.

        Args:
            adapted: The module.
            names: Of its tensors in the base model, whole.
            read: Returns a tensor of the base in float32, by its name; peft adds to it in place.

        """
        if isinstance(adapted.module, ModulesToSaveWrapper):
            values = adapted.module.modules_to_save[adapted.module.active_adapter].state_dict()
            return {name: values[name.removeprefix(adapted.path + ".")] for name in names}
        layer: Any = adapted.module
        if isinstance(layer, TrainableTokensWrapper):
            layer = layer.token_adapter
        base_layer = layer.get_base_layer()
        ends = [name.removeprefix(adapted.path + ".") for name in names]
        empty = {end: _get(base_layer, end) for end in ends}
        for end, name in zip(ends, names, strict=True):
            _set(base_layer, end, nn.Parameter(read(name), requires_grad=False))
        try:
            with torch.no_grad():
                while isinstance(layer, BaseTunerLayer):  # parameters of experts: one layer around another
                    layer.merge(adapter_names=["default"])
                    layer.merged_adapters.clear()
                    layer = layer.base_layer
            return {name: _get(base_layer, end).detach() for end, name in zip(ends, names, strict=True)}
        finally:
            for end, value in empty.items():
                _set(base_layer, end, value)


def _stay(*_: Any, **__: Any) -> None:
    """Leave an adapter on its device."""


def _check_loaded(modules: list[AdaptedModule]) -> None:
    """Raise RuntimeError if a tensor of the adapter has no values: torch adds those without an error, as zeros."""
    for path, module in modules:
        for name, parameter in module.named_parameters():
            if parameter.is_meta and not name.startswith(_BASE_PARTS) and ".base_layer." not in name:
                raise RuntimeError(f"{path}.{name} was not loaded from the adapter")


_BASE_PARTS = ("base_layer.", "original_module.")


def _list_adapted(path: str, module: nn.Module) -> Iterator[AdaptedModule]:
    """Yield the modules that peft has wrapped, and nothing inside them."""
    if isinstance(module, AuxiliaryTrainingWrapper | BaseTunerLayer):
        yield AdaptedModule(path, module)
        return
    for name, child in module.named_children():
        yield from _list_adapted(f"{path}.{name}" if path else name, child)


def _get(module: nn.Module, path: str) -> Any:
    """Return the tensor at a path below a module."""
    parent, _, name = path.rpartition(".")
    return getattr(module.get_submodule(parent), name)


def _set(module: nn.Module, path: str, value: Any) -> None:
    """Set the tensor at a path below a module."""
    parent, _, name = path.rpartition(".")
    setattr(module.get_submodule(parent), name, value)
