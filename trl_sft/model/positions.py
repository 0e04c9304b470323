"""How many positions a model knows: a limit where each position has a row in a table, a length of training otherwise.

Inputs: a model's configuration, and the model on torch's meta device. Outputs: numbers of positions. A table (learned
positions as in GPT-2 and OPT, fixed ones as in GPT-J) has no row for a later position, so a longer row stops the
training. Rotary positions go on, but the model was never trained there. Deliberately not here: the rows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch
from transformers import PretrainedConfig, PreTrainedModel

# The names under which configurations have the number of positions; transformers maps most others to the first
_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "max_sequence_length", "seq_length")
_TABLE = re.compile(r"(?:^|_)(?:wpe|pos|positions?|positional)(?:_|$)")  # a part of a module's or buffer's path
_TABLE_DIMENSIONS = 2  # positions, and what each has
_MOST_OFFSET = 8  # rows of a table before the first position: OPT and BART have 2


def read_limit(config: PretrainedConfig) -> int | None:
    """Return the number of positions that a configuration names; None = it names none, as for ALiBi.

    Rotary positions that are scaled (YaRN, linear, dynamic) reach farther by their factor.
    """
    text_config = config.get_text_config()
    positions = next((value for name in _NAMES if isinstance(value := getattr(text_config, name, None), int)), None)
    if positions is None or positions < 1:
        return None
    scaling = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None) or {}
    kinds = [scaling, *(kind for kind in scaling.values() if isinstance(kind, dict))]  # one for each kind of layer
    for kind in kinds:
        factor = kind.get("factor")
        if isinstance(factor, int | float) and factor > 1:
            original = kind.get("original_max_position_embeddings") or positions
            positions = max(positions, int(original * factor))
    return positions


def find_table(model: PreTrainedModel, positions: int) -> int | None:
    """Return the number of positions for which a model has a row in a table; None = it has no such table.

    Args:
        model: the model, on any device.
        positions: the number of positions that its configuration names.

    """
    for path, rows, padding in _list_tables(model):
        is_named = _TABLE.search(path.rpartition(".")[2].casefold())
        if is_named and positions <= rows <= positions + _MOST_OFFSET:
            return min(positions, rows - padding)
    return None


def _list_tables(model: PreTrainedModel) -> Iterator[tuple[str, int, int]]:
    """Yield embeddings, and buffers of two dimensions: path, rows, and rows before the first position of a text."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding):
            yield path, module.num_embeddings, 0 if module.padding_idx is None else module.padding_idx + 1
    for path, tensor in model.named_buffers():
        if tensor.dim() == _TABLE_DIMENSIONS:
            yield path, len(tensor), 0
