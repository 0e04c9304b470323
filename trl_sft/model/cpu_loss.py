"""The loss where there is no Triton (CPU, Apple MPS): one projection of the labelled positions, in bounded chunks.

In: a model that TRL gave its fused head. Out: the same model, whose fused forward scores positions with a
label alone and computes what TRL's kernel computes with fewer passes over the logits. All around it stays
TRL's: which positions count, soft-capping, scaling, experts, ZeRO's gathering. Without Triton TRL 1.16 scores
every position, in many passes over each tile (`trl.kernels.chunked_logprob._forward_tile`).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel
from trl.trainer import utils

LOGITS_GIB = 0.5  # that logits, or what is kept of them for the backward pass, may take
# TRL's head as 1.16 has it; the older ones keep their own loss
AVAILABLE = all(hasattr(utils, name) for name in ("add_fused_lm_head", "_ChunkedLogProbFunction", "_use_triton"))
if AVAILABLE:  # and its function takes what it takes there
    AVAILABLE = len(inspect.signature(utils._ChunkedLogProbFunction.forward).parameters) == 10
_CHUNK = 1024  # rows that are projected at once, if they fit
_FLOAT = 4  # bytes

Numbers = tuple[float, float | None, float]  # one by temperature, soft cap, scale of the logits


def install(model: PreTrainedModel, logits_gib: float) -> bool:
    """Have the fused forward of `model` take this loss; false where TRL's stays: with Triton, or in older versions."""
    if not AVAILABLE or utils._use_triton(model.device):
        return False
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    theirs = base.forward

    @functools.wraps(type(base).forward)
    def forward(_: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return theirs(*args, **kwargs)
        with _ours(logits_gib):
            return theirs(*args, fused_lm_head=True, **kwargs)

    base.forward = types.MethodType(forward, base)
    base.logits_gib = logits_gib  # for the screen, which asks the live model
    return True


@contextlib.contextmanager
def _ours(logits_gib: float) -> Iterator[None]:
    """Put our function in the place of TRL's inside the block: the forward of one model, and no longer."""
    before = utils._ChunkedLogProbFunction, utils._use_triton
    bounded = functools.partial(_apply, int(logits_gib * 2**30))
    utils._ChunkedLogProbFunction = types.SimpleNamespace(apply=bounded)
    utils._use_triton = lambda _: True  # TRL then scores the positions with a label alone
    try:
        yield
    finally:
        utils._ChunkedLogProbFunction, utils._use_triton = before


def _apply(budget: int, *given: Any) -> tuple[torch.Tensor | None, ...]:
    """Return log-probability, entropy, None, None, and whether it is the most likely token: (positions,) each.

    `given` as TRL hands them: hidden, weight, bias, targets, temperature, size of a tile, soft cap, scale, names.
    """
    hidden, weight, bias, targets, temperature, _, softcap, scale, _ = given
    how = LossOptions((1 / temperature, softcap, scale), budget, torch.is_grad_enabled())
    found = LogProbs.apply(hidden, weight, bias, targets, how)  # type: ignore[no-untyped-call]
    return found[0], found[1], None, None, found[2]


class LossOptions(NamedTuple):
    """How logits are made."""

    numbers: Numbers
    budget: int  # bytes that they may take
    backward: bool  # whether a backward pass may follow


class LogProbs(torch.autograd.Function):
    """Log-probabilities of `targets` under `hidden @ weight.T`: hidden (positions, width), weight (words, width)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        how: LossOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities, entropies, and where the target is the most likely word: (positions,) each."""
        ctx.set_materialize_grads(False)
        numbers, budget, backward = how
        size, words = hidden.shape[0], weight.shape[0]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # what a backward pass needs again is kept where it fits, and else projected a second time
        fits = size * words * _FLOAT <= budget and numbers[1] is None and backward
        kept = hidden.new_empty((size, words), dtype=torch.float32) if fits else None
        chunk = max(1, min(_CHUNK, budget // (words * _FLOAT)))
        log_probs, entropy = (hidden.new_empty(size, dtype=torch.float32) for _ in range(2))
        top = hidden.new_empty(size, dtype=torch.bool)
        with torch.autocast(device, enabled=False):  # which would round the sums
            for start in range(0, size, chunk):
                here = slice(start, start + chunk)
                logits = _logits(hidden[here], weight, bias, numbers, dtype)
                most, wanted = logits.amax(-1), logits.gather(1, targets[here, None]).squeeze(1)
                top[here] = _first(logits, most, wanted, targets[here])
                logits.sub_(most[:, None])
                odds = torch.exp(logits, out=kept[here]) if kept is not None else logits.exp()
                whole = odds.sum(-1)
                mean = torch.bmm(odds[:, None], logits[:, :, None]).view(-1) / whole
                log_probs[here] = wanted - most - whole.log()
                entropy[here] = whole.log() - mean
                if kept is not None:
                    odds.div_(whole[:, None])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.kept, ctx.numbers, ctx.chunk, ctx.dtype = kept, numbers, chunk, dtype
        ctx.mark_non_differentiable(entropy, top)
        return log_probs, entropy, top

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias, summed in float32."""
        hidden, weight, bias, _ = ctx.saved_tensors
        nothing: tuple[None, ...] = (None, None)
        if grad is None:
            return (None, None, None, *nothing)
        to_hidden, to_weight, to_bias = ctx.needs_input_grad[:3]
        of_hidden = torch.empty_like(hidden) if to_hidden else None
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if to_weight else None
        of_bias = torch.zeros_like(bias, dtype=torch.float32) if to_bias else None
        chunk = hidden.shape[0] if ctx.kept is not None else ctx.chunk
        with utils.maybe_gather_lm_head_ctx(weight, bias):  # ZeRO-3 has them apart again by now
            for start in range(0, hidden.shape[0], max(chunk, 1)):
                here = slice(start, start + chunk)
                part = _slope(ctx, hidden[here], here, grad[here].float()).to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[here] = part @ weight.to(ctx.dtype)
                if of_weight is not None and ctx.dtype == torch.float32:
                    of_weight.addmm_(part.t(), hidden[here].to(ctx.dtype))
                elif of_weight is not None:
                    of_weight += part.t() @ hidden[here].to(ctx.dtype)
                if of_bias is not None:
                    of_bias += part.float().sum(0)
        ctx.kept = None
        weights = None if of_weight is None else of_weight.to(weight.dtype)
        return of_hidden, weights, None if of_bias is None else of_bias.to(bias.dtype), *nothing


def _logits(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, numbers: Numbers, dtype: torch.dtype
) -> torch.Tensor:
    """Return float32 logits: (positions, words)."""
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))
    logits = logits.float()
    by_temperature, softcap, scale = numbers
    if scale != 1:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits if by_temperature == 1 else logits.mul_(by_temperature)


def _first(logits: torch.Tensor, most: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Tell where the target is the most likely word; of equal ones the first is."""
    top = wanted >= most
    rows = top.nonzero().squeeze(1)
    if len(rows):
        top[rows] = logits[rows].argmax(-1) == targets[rows]
    return top


def _slope(ctx: Any, hidden: torch.Tensor, here: slice, grad: torch.Tensor) -> torch.Tensor:
    """Return the gradient at the projection's output: (positions, words)."""
    _, weight, bias, targets = ctx.saved_tensors
    by_temperature, softcap, scale = ctx.numbers
    logits = None
    if ctx.kept is not None:
        odds = ctx.kept
    else:
        logits = _logits(hidden, weight, bias, ctx.numbers, ctx.dtype)
        odds = logits.softmax(-1)
    slope: torch.Tensor = odds.mul_(-grad[:, None])  # of log p_t: 1 at the target, less p everywhere
    slope[torch.arange(len(grad), device=grad.device), targets[here]] += grad
    factor = by_temperature * scale
    if factor != 1:
        slope.mul_(factor)
    if softcap is not None:
        assert logits is not None
        slope.mul_(1 - (logits / (softcap * by_temperature)) ** 2)
    return slope
