"""The tensors of a base model, read one by one from its files, as the model names them.

Inputs: the folder of a base model, the model on torch's meta device. Outputs: tensors. Memory holds one tensor at a
time: safetensors maps a file and copies what is asked for. On request a weight is read as bitsandbytes quantizes and
dequantizes it. Deliberately not here: what is added to a tensor (`merge`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AutoHfQuantizer

from trl_sft.errors import Fault, RecipeError
from trl_sft.model import patches
from trl_sft.serving import base_folder

_BLOCK_SIZE = 64  # values that share a scale: bitsandbytes' Params4bit, which transformers leaves as it is


def load_on_meta(folder: Path, fields: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Return a model without values, of the class that training loads; weights that are tied are one object.

    Args:
        folder: Of the model.
        fields: Of its configuration, which a run set by `model.config`; None = those of the folder.

    """
    config = AutoConfig.from_pretrained(folder)
    model_class = getattr(transformers, (config.architectures or [""])[0], None) or AutoModelForCausalLM
    return model_class.from_pretrained(folder, device_map="meta", use_safetensors=True, **(fields or {}))


class BaseTensors:
    """Reads the tensors of a base model by the names that the model has for them."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """Find the file of each tensor.

        Args:
            folder: Of the base model.
            model: On the meta device, as `load_on_meta` returns it.

        Raises:
            RecipeError: The files name tensors otherwise than the model.

        """
        self._places: dict[str, tuple[Path, str]] = {}  # name in the model -> file, name in the file
        names = set(model.state_dict())
        prefix = f"{model.base_model_prefix}."
        for path in base_folder.list_weight_files(folder):
            with safe_open(path, "pt") as file:
                for stored in file.keys():  # noqa: SIM118 (not a mapping)
                    known = (stored, prefix + stored, stored.removeprefix(prefix))
                    name = next((name for name in known if name in names), None)
                    if name is not None:
                        self._places[name] = path, stored
        self.ties = _find_ties(model)
        missing = [name for name in names if self._find(name) is None]
        if missing:
            problem = (
                f"{model.config.architectures[0]} holds its weights otherwise than its files do ({sorted(missing)[0]} "
                "is made of several tensors), so they cannot be merged one by one"
            )
            fix = "Merge it with peft's merge_and_unload, which needs the memory of the whole model."
            raise RecipeError(Fault(str(folder), problem, fix, code="merge.unsupported"))
        self._quantization: BitsAndBytesConfig | None = None
        self._dtype = model.dtype
        self.quantized: set[str] = set()  # names of the weights that training quantizes
        self._transposed = {f"{n}.weight" for n, module in model.named_modules() if isinstance(module, Conv1D)}

    def read(self, name: str) -> torch.Tensor:
        """Return a tensor as its file has it."""
        place = self._find(name)
        assert place is not None
        with safe_open(place[0], "pt") as file:
            return file.get_tensor(place[1])  # type: ignore[no-any-return]

    def set_quantization(self, folder: Path, settings: dict[str, Any], dtype: str | None) -> None:
        """Find the weights that training quantizes: those of the layers that transformers replaces.

        Args:
            folder: Of the base model.
            settings: Of `transformers.BitsAndBytesConfig`.
            dtype: In which training loads the weights before it quantizes them, or "auto"; None = float32, as in TRL.

        """
        config = AutoConfig.from_pretrained(folder)
        model_class = getattr(transformers, (config.architectures or [""])[0], None) or AutoModelForCausalLM
        with torch.device("meta"):
            model = model_class._from_config(config)
            self._quantization = BitsAndBytesConfig(**settings)
            quantizer = AutoHfQuantizer.from_config(self._quantization, pre_quantized=False)
            quantizer.preprocess_model(model=model, device_map={"": "cpu"})
        self._dtype = self._dtype if dtype == "auto" else getattr(torch, dtype or "float32")
        kinds = ("Linear4bit", "Linear8bitLt")
        self.quantized = {f"{n}.weight" for n, module in model.named_modules() if type(module).__name__ in kinds}

    def read_dequantized(self, name: str) -> torch.Tensor:
        """Return a weight as training computes with it: quantized and dequantized; another tensor as it is."""
        tensor = self.read(name)
        if name not in self.quantized:
            return tensor
        assert self._quantization is not None
        is_transposed = name in self._transposed
        weight = (tensor.T.contiguous() if is_transposed else tensor).to(self._dtype)
        restored = _quantize_and_restore(weight, self._quantization)
        return restored.T.contiguous() if is_transposed else restored

    def _find(self, name: str) -> tuple[Path, str] | None:
        """Return file and stored name of a tensor, which may be stored under the name that it is tied to."""
        names = [name, *self.ties.get(name, ())]
        return next((self._places[tied] for tied in names if tied in self._places), None)


def _quantize_and_restore(weight: torch.Tensor, config: BitsAndBytesConfig) -> torch.Tensor:
    """Return a weight with the error of its quantization, in the dtype that bitsandbytes restores."""
    from bitsandbytes import functional  # noqa: PLC0415 (needed for quantized runs only)

    patches.dequantize_rows_of_any_length()
    if config.load_in_4bit:
        packed, state = functional.quantize_4bit(
            weight,
            blocksize=_BLOCK_SIZE,
            compress_statistics=config.bnb_4bit_use_double_quant,
            quant_type=config.bnb_4bit_quant_type,
        )
        return functional.dequantize_4bit(packed, state)  # type: ignore[no-any-return]
    integers, scales, _ = functional.int8_vectorwise_quant(weight.half())
    return functional.int8_vectorwise_dequant(integers, scales)  # type: ignore[no-any-return]


def _find_ties(model: PreTrainedModel) -> dict[str, list[str]]:
    """Return for each parameter that has several names the other names."""
    by_object: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        by_object.setdefault(id(parameter), []).append(name)
    return {name: [other for other in names if other != name] for names in by_object.values() for name in names}
