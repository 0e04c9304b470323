"""Writes a GGUF file, one tensor at a time.

Inputs: the folder of a whole model, its vocabulary, the type of the weights. Outputs: one file; memory holds one tensor
in float32 and its packed bytes. Header and types are planned before, so that the size is known before anything is
written. Deliberately not here: what a model needs (`gguf_architectures`), the tokenizer (`gguf_vocabulary`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as TensorType

from trl_sft.errors import Fault, RecipeError
from trl_sft.row_progress import RowProgress
from trl_sft.serving import base_tensors
from trl_sft.serving.export import gguf_architectures, gguf_rope
from trl_sft.serving.export.gguf_vocabulary import Vocabulary

FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_FLOATS = ("f32", "f16", "bf16")
_F16_MAX = float(np.finfo(np.float16).max)


class PlannedTensor(NamedTuple):
    """A tensor of the file, before its values are read."""

    name: str  # in the file
    source: str  # in the model; "" = one of the factors of the rotary embedding
    shape: tuple[int, ...]
    type: TensorType

    @property
    def size(self) -> int:
        """Bytes in the file."""
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        return int(math.prod(self.shape) // block * block_bytes)


@dataclass(frozen=True)
class PlannedFile:
    """What a GGUF file will hold.

    Attributes:
        folder: of the model.
        config: of the model.
        architecture: how it is written.
        tensors: in the order of the file.
        factors: of the rotary embedding, by name.
        file_type: a key of `FILE_TYPES`.

    """

    folder: Path
    config: Any
    architecture: gguf_architectures.Architecture
    tensors: list[PlannedTensor]
    factors: dict[str, torch.Tensor]
    file_type: str

    @property
    def parameters(self) -> dict[str, Any]:
        """The metadata of the model, by key without the name of the architecture."""
        return gguf_architectures.describe_parameters(self.config, self.architecture)

    @property
    def size(self) -> int:
        """Bytes of the tensors."""
        return sum(tensor.size for tensor in self.tensors)

    def count_types(self) -> dict[str, int]:
        """Return how many tensors have each type."""
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
        return counts


def plan(folder: Path, model: Any, file_type: str, *, where: str) -> PlannedFile:
    """Return what the file of a model will hold.

    Args:
        folder: Of the model; its weights are read later.
        model: On the meta device.
        file_type: A key of `FILE_TYPES`.
        where: The place that a refusal names.

    Raises:
        RecipeError: The model cannot be written.

    """
    config = model.config.get_text_config()
    architecture = gguf_architectures.find_architecture(model.config, where)
    names = gguf.get_tensor_name_map(_find_arch(architecture.name), config.num_hidden_layers)
    tensors, factors = [], gguf_rope.compute_factors(config)
    for name, factor in factors.items():
        tensors.append(PlannedTensor(name, "", tuple(factor.shape), TensorType.F32))
    for source, tensor in model.state_dict().items():
        if config.tie_word_embeddings and source == "lm_head.weight":
            continue
        name = names.get_name(source, try_suffixes=(".weight", ".bias"))
        if name is None:
            problem = f"{(model.config.architectures or [''])[0]}: the tensor {source} has no name in GGUF"
            fix = "Export with `--to merged` or `--to vllm`."
            raise RecipeError(Fault(where, problem, fix, code="export.unsupported_architecture"))
        shape = tuple(tensor.shape)
        if architecture.name == "gpt2" and source.endswith((".c_attn.weight", ".c_proj.weight", ".c_fc.weight")):
            shape = shape[::-1]
        tensors.append(PlannedTensor(name, source, shape, _choose_type(name, shape, file_type)))
    planned = PlannedFile(folder, config, architecture, tensors, factors, file_type)
    _check_quantized(planned, where)
    return planned


def _find_arch(name: str) -> gguf.MODEL_ARCH:
    """Return the architecture of the `gguf` package."""
    return next(arch for arch, text in gguf.MODEL_ARCH_NAMES.items() if text == name)


def _choose_type(name: str, shape: tuple[int, ...], file_type: str) -> TensorType:
    """Return the type of a tensor: vectors stay in float32, and rows that no block divides in float16."""
    if len(shape) < 2 or name.endswith("_norm.weight") or name.startswith("position_embd"):
        return TensorType.F32
    wanted = TensorType[file_type.upper()]
    block, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block == 0 else TensorType.F16


def _check_quantized(planned: PlannedFile, where: str) -> None:
    """Refuse a type of which not one tensor would be. Raises RecipeError."""
    wanted = planned.file_type.upper()
    if planned.file_type in _FLOATS or wanted in planned.count_types():
        return
    block, _ = gguf.GGML_QUANT_SIZES[TensorType[wanted]]
    problem = f"no weight can be written as {planned.file_type}: it packs {block} values of a row together, and no row "
    problem += f"is a multiple of {block} long"
    raise RecipeError(Fault(where, problem, "Write `--gguf-type f16`.", code="export.unsupported_type"))


def write(
    planned: PlannedFile,
    vocabulary: Vocabulary,
    path: Path,
    *,
    metadata: dict[str, Any],
    read: Callable[[str], torch.Tensor] | None = None,
) -> None:
    """Write the file.

    Args:
        planned: What it holds.
        vocabulary: The tokenizer.
        path: Of the file, which does not exist.
        metadata: Further texts and numbers by their whole key, as `general.name`.
        read: Returns a tensor of the model by its name; None = that of the folder.

    Raises:
        RecipeError: A weight is not finite, or has no place in the type.

    """
    writer = gguf.GGUFWriter(path, planned.architecture.name)
    try:
        add_metadata(writer, metadata)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(FILE_TYPES[planned.file_type])
        add_metadata(writer, {f"{planned.architecture.name}.{key}": value for key, value in planned.parameters.items()})
        vocabulary.add_to(writer)
        for tensor in planned.tensors:
            is_float = tensor.type in (TensorType.F32, TensorType.F16)
            shape = tensor.shape if is_float else gguf.quant_shape_to_byte_shape(tensor.shape, tensor.type)
            kind = np.dtype({TensorType.F32: np.float32, TensorType.F16: np.float16}.get(tensor.type, np.uint8))
            writer.add_tensor_info(tensor.name, shape, kind, tensor.size, raw_dtype=tensor.type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        with RowProgress("Writing GGUF", len(planned.tensors), unit="tensors") as progress:
            for values in _read(planned, read):
                writer.write_tensor_data(values)
                progress.update(1)
    finally:
        writer.close()


def add_metadata(writer: gguf.GGUFWriter, values: dict[str, Any]) -> None:
    """Add texts, numbers, truth values and lists to the header, with the types that llama.cpp expects."""
    for key, value in values.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _read(planned: PlannedFile, read: Callable[[str], torch.Tensor] | None) -> Iterator[np.ndarray[Any, Any]]:
    """Yield the packed values of each tensor, in the order of the file."""
    if read is None:
        read = base_tensors.BaseTensors(planned.folder, base_tensors.load_on_meta(planned.folder)).read
    for tensor in planned.tensors:
        values = read(tensor.source) if tensor.source else planned.factors[tensor.name]
        values = gguf_architectures.convert(
            tensor.source, values, config=planned.config, architecture=planned.architecture
        )
        values = values.float().contiguous()
        if not bool(values.isfinite().all()):
            problem = f"{tensor.source} has values that are not finite"
            fix = "Train again: these weights give no answers."
            raise RecipeError(Fault(str(planned.folder), problem, fix, code="export.not_finite"))
        if tensor.type == TensorType.F16 and float(values.abs().max()) > _F16_MAX:
            problem = f"{tensor.source} has values that f16 cannot hold: they are larger than {_F16_MAX:,.0f}"
            fix = "Write `--gguf-type bf16` or `--gguf-type f32`."
            raise RecipeError(Fault(str(planned.folder), problem, fix, code="export.not_finite"))
        yield gguf.quants.quantize(values.numpy(), tensor.type)
