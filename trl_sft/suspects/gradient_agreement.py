"""How far a training row pulls the weights where held-out rows pull them: the agreement of their gradients.

Inputs: a live model, training rows, held-out rows. Outputs: for each training row the product of its gradient with the
direction of the held-out rows' mean gradient, in nats for a step of length 1: above 0 = a step that lowers the loss of
the row lowers theirs too. No gradient of a training row is computed. With the direction u the product is the slope of
the row's loss along u, (loss(w + eu) - loss(w - eu)) / 2e: two forward passes for each row, with an error of order e
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
) -> np.ndarray:
    """Return the agreement of each training row with the held-out rows: (rows,) float64.

    Args:
        model: in eval mode; its weights are the same afterwards, bit by bit.
        rows: training rows.
        held_out: rows whose mean gradient gives the direction.
        logits_gib: GiB that the logits of a batch may take.
        count: is called with the number of rows that were passed forward.

    """
    weights = find_trained_weights(model)
    with _gradients_of(model, weights):
        direction = compute_direction(model, weights, held_out, logits_gib=logits_gib)
    length = float(torch.stack([weight.detach().float().norm() for weight in weights]).norm())
    step = _STEP * max(length, 1e-12)
    losses = []
    for sign in (1, -1):
        with _moved(weights, direction, sign * step):
            losses.append(token_rows.measure_losses(model, rows, logits_gib=logits_gib, count=count))
    slopes: np.ndarray = (losses[0] - losses[1]) / (2 * step)
    return slopes


def find_trained_weights(model: PreTrainedModel) -> list[torch.nn.Parameter]:
    """Return the weights that the run has trained: those of the adapter, or all of a model without one."""
    named = [(name, weight) for name, weight in model.named_parameters() if weight.is_floating_point()]
    if not hasattr(model, "peft_config"):
        return [weight for _, weight in named]
    parts = ("lora_", "modules_to_save.", "trainable_tokens_")
    return [weight for name, weight in named if any(part in name for part in parts)]


def compute_direction(
    model: PreTrainedModel, weights: Sequence[torch.nn.Parameter], held_out: Sequence[TokenRow], *, logits_gib: float
) -> list[torch.Tensor]:
    """Return the mean gradient of rows, scaled to length 1: one tensor for each weight, which requires a gradient."""
    totals = [torch.zeros_like(weight, dtype=torch.float32) for weight in weights]
    for batch in token_rows.split_into_batches(model, held_out, logits_gib):
        loss = token_rows.compute_losses(model, [held_out[place] for place in batch]).sum()
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for place, gradient in enumerate(gradients):
            if gradient is not None:
                totals[place] += gradient.float()
    length = torch.stack([total.norm() for total in totals]).norm().clamp_min(1e-30)
    return [total / length for total in totals]


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
    """Move the weights along a direction inside the block."""
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
