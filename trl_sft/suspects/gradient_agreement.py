"""How far a training row pulls the weights where held-out rows pull them: the agreement of their gradients.

Inputs: a live model, training rows, held-out rows. Outputs: for each row the product of its gradient with the mean
gradient of held-out rows: above 0 = a step that lowers the loss of the row lowers theirs too. No gradient of a training
row is computed. With the mean gradient as length times direction u, the product is the length times the slope of the
row's loss along u, (loss(w + eu) - loss(w - eu)) / 2e: two forward passes for each row, with an error of order e
squared. Not here: what an agreement tells (`signals`).

The slope along a gradient is the influence of Pruthi et al. 2020 (TracIn) for one checkpoint and one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from trl_sft.suspects import token_rows
from trl_sft.suspects.token_rows import TokenRow

_STEP = 2e-4  # length of the step along the direction, relative to the length of the weights


def measure_agreement(
    model: PreTrainedModel,
    rows: Sequence[TokenRow],
    held_out: Sequence[TokenRow],
    *,
    logits_gib: float,
    count: Callable[[int], None],
) -> tuple[np.ndarray, np.ndarray]:
    """Return the agreement of each training row, and of each held-out row, with the held-out rows.

    A held-out row is compared with the other half of them: its own gradient is a part of the mean of all, and would
    make it agree better than any training row can.

    Args:
        model: in eval mode; its weights are the same afterwards, bit by bit.
        rows: training rows.
        held_out: rows whose mean gradient is agreed with; rows of one prompt stand together.
        logits_gib: GiB that the logits of a batch may take.
        count: is called with the number of rows that were passed forward.

    Returns:
        (rows,) and (held_out,) float64.

    """
    weights = find_trained_weights(model)

    def measure(part: Sequence[TokenRow], gradient: Sequence[torch.Tensor]) -> np.ndarray:
        return _measure_slopes(model, weights, part, gradient=gradient, logits_gib=logits_gib, count=count)

    middle = len(held_out) // 2
    halves = held_out[:middle], held_out[middle:]
    with _gradients_of(model, weights):
        first = sum_gradients(model, weights, halves[0], logits_gib=logits_gib)
    of_second = measure(halves[1], _scale(first, len(halves[0])))
    first = [part.cpu() for part in first]
    with _gradients_of(model, weights):
        second = sum_gradients(model, weights, halves[1], logits_gib=logits_gib)
    of_first = measure(halves[0], _scale(second, len(halves[1])))
    total = [one.to(other.device) + other for one, other in zip(first, second, strict=True)]
    del first, second
    return measure(rows, _scale(total, len(held_out))), np.concatenate([of_first, of_second])


def _scale(gradients: Sequence[torch.Tensor], number: int) -> list[torch.Tensor]:
    """Return the mean of a sum over rows."""
    return [gradient / max(number, 1) for gradient in gradients]


def _measure_slopes(
    model: PreTrainedModel,
    weights: Sequence[torch.nn.Parameter],
    rows: Sequence[TokenRow],
    *,
    gradient: Sequence[torch.Tensor],
    logits_gib: float,
    count: Callable[[int], None],
) -> np.ndarray:
    """Return the product of each row's gradient with a gradient: (rows,) float64."""
    length = float(torch.stack([weight.detach().float().norm() for weight in weights]).norm())
    norm = float(torch.stack([part.norm() for part in gradient]).norm())
    step = _STEP * max(length, 1e-12)
    losses = []
    for sign in (1, -1):
        with _moved(weights, gradient, sign * step / max(norm, 1e-30)):
            losses.append(token_rows.measure_losses(model, rows, logits_gib=logits_gib, count=count))
    slopes: np.ndarray = (losses[0] - losses[1]) / (2 * step) * norm
    return slopes


def find_trained_weights(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights that the run has trained: those of the adapter, or all of a model without one."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    if not hasattr(model, "peft_config"):
        return [weight for _, weight in named]
    parts = ("lora_", "modules_to_save.", "trainable_tokens_")
    return [weight for name, weight in named if any(part in name for part in parts)]


def sum_gradients(
    model: PreTrainedModel, weights: Sequence[torch.nn.Parameter], held_out: Sequence[TokenRow], *, logits_gib: float
) -> list[torch.Tensor]:
    """Return the sum of the gradients of rows: one float32 tensor for each weight, which requires a gradient."""
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for batch in token_rows.split_into_batches(model, held_out, logits_gib):
        loss = token_rows.compute_losses(model, [held_out[place] for place in batch]).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                totals[place] += gradient.float()
    return totals


@contextmanager
def _gradients_of(model: PreTrainedModel, weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Let these weights alone have a gradient inside the block."""
    wanted = {id(weight) for weight in weights}
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(id(parameter) in wanted)
        yield
    finally:
        for parameter, had_gradient in before:
            if parameter.is_floating_point():
                parameter.requires_grad_(had_gradient)


@contextmanager
def _moved(weights: Sequence[torch.nn.Parameter], direction: Sequence[torch.Tensor], step: float) -> Iterator[None]:
    """Move the weights by `step` times a direction inside the block."""
    before = [weight.detach().clone() for weight in weights]
    try:
        with torch.no_grad():
            for weight, part in zip(weights, direction, strict=True):
                weight.copy_((weight.float() + step * part).to(weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, saved in zip(weights, before, strict=True):
                weight.copy_(saved)
