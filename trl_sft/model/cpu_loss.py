"""The loss where there is no Triton (CPU, Apple MPS): logits of labelled positions only, in chunks of bounded size.

In: a model with TRL's fused head, the forward pass that computes hidden states and loss together. Out: the same model,
whose fused forward pass computes logits for labelled positions only. The values equal those of TRL's kernel, with fewer
passes over the logits. TRL still decides which positions count, and how logits are capped and scaled; experts and the
gathering of ZeRO are also TRL's. Without Triton, TRL 1.16 computes every position, in many passes over each tile
(`trl.kernels.chunked_logprob._forward_tile`). Deliberately absent: GPUs, which keep TRL's loss.
"""

from __future__ import annotations

import functools
import types
from typing import Any, NamedTuple

import torch
import trl
from transformers import PreTrainedModel
from trl.trainer import utils

from trl_sft.model import patches
from trl_sft.model.load import unwrap_adapter

LOGITS_GIB = (
    0.5  # default of run.logits_gib: GiB of logits, or of the probabilities that are stored for the backward pass
)
AVAILABLE = (
    not patches.find_fused_head_problem()
)  # False with versions of TRL that have another fused head; they keep their own loss
_CHUNK_ROWS = 1024  # positions in one chunk of logits, at most
_FLOAT_BYTES = 4


class LogitOptions(NamedTuple):
    """Settings of the step from hidden states to logits."""

    inverse_temperature: float
    softcap: float | None  # None = not capped
    scale: float
    max_bytes: int  # of logits that exist at one time
    needs_backward: bool  # whether a backward pass may follow


def replaces_trl_loss(device: torch.device) -> bool:
    """Tell whether this loss replaces TRL's on a device: TRL has the fused head, and Triton is not used there."""
    return AVAILABLE and not patches.uses_triton(device)


def describe_mismatch(device: torch.device) -> str:
    """Return a line for the screen if a newer TRL keeps its slow loss because this loss does not fit it; else ""."""
    if AVAILABLE or not patches.expects_fused_head() or device.type in ("cuda", "xpu"):
        return ""
    return f"TRL's own; the faster CPU loss does not fit TRL {trl.__version__}"


def install(model: PreTrainedModel, logits_gib: float) -> bool:
    """Replace TRL's loss in the fused forward pass of `model`.

    Args:
        model: A model with TRL's fused head, with or without an adapter.
        logits_gib: GiB that logits, or the probabilities stored for the backward pass, may take.

    Returns:
        True if the loss was replaced; False if TRL's loss stays: with Triton, or with another version of TRL.

    """
    if not replaces_trl_loss(model.device):
        return False
    base = unwrap_adapter(model)
    trl_forward = base.forward
    function = functools.partial(_apply, int(logits_gib * 2**30))

    @functools.wraps(type(base).forward)
    def forward(_: PreTrainedModel, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return trl_forward(*args, **kwargs)
        with patches.replace_fused_loss(function):
            return trl_forward(*args, fused_lm_head=True, **kwargs)

    base.forward = types.MethodType(forward, base)
    base.logits_gib = logits_gib  # the screen reads this attribute of the live model
    return True


def _apply(max_bytes: int, *arguments: Any) -> tuple[torch.Tensor | None, ...]:
    """Return what TRL's function returns for its arguments, computed by `LogProbs`.

    Returns:
        Log-probability, entropy, None, None, and whether the target is the most likely token: (positions,) each.

    """
    hidden, weight, bias, targets, temperature, _chunk_size, softcap, scale, _outputs = arguments
    options = LogitOptions(1 / temperature, softcap, scale, max_bytes, torch.is_grad_enabled())
    log_probs, entropy, is_top = LogProbs.apply(hidden, weight, bias, targets, options)  # type: ignore[no-untyped-call]
    return log_probs, entropy, None, None, is_top


class LogProbs(torch.autograd.Function):
    """Log-probabilities of `targets` under the logits `hidden @ weight.T + bias`.

    hidden: (positions, width), weight: (vocab_size, width), bias: (vocab_size,), targets: (positions,).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        options: LogitOptions,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities, entropies, and where the target is the most likely token: (positions,) each."""
        ctx.set_materialize_grads(False)
        positions, vocab_size = hidden.shape[0], weight.shape[0]
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        # the probabilities are stored if they fit; otherwise the backward pass computes the logits a second time
        fits = positions * vocab_size * _FLOAT_BYTES <= options.max_bytes
        keeps_probs = fits and options.softcap is None and options.needs_backward
        probs = hidden.new_empty((positions, vocab_size), dtype=torch.float32) if keeps_probs else None
        chunk_rows = max(1, min(_CHUNK_ROWS, options.max_bytes // (vocab_size * _FLOAT_BYTES)))
        log_probs = hidden.new_empty(positions, dtype=torch.float32)
        entropy = hidden.new_empty(positions, dtype=torch.float32)
        is_top = hidden.new_empty(positions, dtype=torch.bool)
        with torch.autocast(device, enabled=False):  # autocast would round the sums
            for start in range(0, positions, chunk_rows):
                rows = slice(start, start + chunk_rows)
                logits = _project(hidden[rows], weight, bias, options=options, dtype=dtype)
                max_logit = logits.amax(-1)
                target_logit = logits.gather(1, targets[rows, None]).squeeze(1)
                is_top[rows] = _find_top(logits, targets[rows], max_logit=max_logit, target_logit=target_logit)
                logits.sub_(max_logit[:, None])
                exp_logits = torch.exp(logits, out=probs[rows]) if probs is not None else logits.exp()
                sum_exp = exp_logits.sum(-1)
                mean_logit = torch.bmm(exp_logits[:, None], logits[:, :, None]).view(-1) / sum_exp
                log_probs[rows] = target_logit - max_logit - sum_exp.log()
                entropy[rows] = sum_exp.log() - mean_logit
                if probs is not None:
                    exp_logits.div_(sum_exp[:, None])
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.probs, ctx.options, ctx.chunk_rows, ctx.dtype = probs, options, chunk_rows, dtype
        ctx.mark_non_differentiable(entropy, is_top)
        return log_probs, entropy, is_top

    @staticmethod
    def backward(ctx: Any, grad_log_probs: torch.Tensor | None, *_: Any) -> tuple[torch.Tensor | None, ...]:
        """Return the gradients of hidden, weight and bias, summed in float32. grad_log_probs: (positions,)."""
        if grad_log_probs is None:
            return None, None, None, None, None
        hidden, weight, bias, _targets = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden) if needs_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias else None
        chunk_rows = max(hidden.shape[0] if ctx.probs is not None else ctx.chunk_rows, 1)
        with utils.maybe_gather_lm_head_ctx(weight, bias):  # ZeRO-3 has partitioned weight and bias again by now
            for start in range(0, hidden.shape[0], chunk_rows):
                rows = slice(start, start + chunk_rows)
                grad_logits = _compute_grad_logits(
                    ctx, hidden[rows], rows, grad_log_probs=grad_log_probs[rows].float()
                ).to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[rows] = grad_logits @ weight.to(ctx.dtype)
                if grad_weight is not None and ctx.dtype == torch.float32:
                    grad_weight.addmm_(grad_logits.t(), hidden[rows].to(ctx.dtype))
                elif grad_weight is not None:
                    grad_weight += grad_logits.t() @ hidden[rows].to(ctx.dtype)
                if grad_bias is not None:
                    grad_bias += grad_logits.float().sum(0)
        ctx.probs = None
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight.dtype)
        if grad_bias is not None:
            grad_bias = grad_bias.to(bias.dtype)
        return grad_hidden, grad_weight, grad_bias, None, None


def _project(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    *,
    options: LogitOptions,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Return float32 logits, scaled, capped and divided by the temperature: (positions, vocab_size)."""
    bias = None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden.to(dtype), weight.to(dtype), bias).float()
    if options.scale != 1:
        logits.mul_(options.scale)
    if options.softcap is not None:
        logits.div_(options.softcap).tanh_().mul_(options.softcap)
    return logits if options.inverse_temperature == 1 else logits.mul_(options.inverse_temperature)


def _find_top(
    logits: torch.Tensor, targets: torch.Tensor, *, max_logit: torch.Tensor, target_logit: torch.Tensor
) -> torch.Tensor:
    """Return whether each target is the most likely token: (positions,). Of several equal logits the first counts."""
    is_top = target_logit >= max_logit
    rows = is_top.nonzero().squeeze(1)
    if len(rows):
        is_top[rows] = logits[rows].argmax(-1) == targets[rows]
    return is_top


def _compute_grad_logits(ctx: Any, hidden: torch.Tensor, rows: slice, *, grad_log_probs: torch.Tensor) -> torch.Tensor:
    """Return the gradient of the logits before scaling and capping: (positions, vocab_size)."""
    _, weight, bias, targets = ctx.saved_tensors
    options: LogitOptions = ctx.options
    logits = None
    if ctx.probs is not None:
        probs = ctx.probs
    else:
        logits = _project(hidden, weight, bias, options=options, dtype=ctx.dtype)
        probs = logits.softmax(-1)
    # the gradient of log p_target is 1 at the target, minus p at every token
    grad_logits: torch.Tensor = probs.mul_(-grad_log_probs[:, None])
    grad_logits[torch.arange(len(grad_log_probs), device=grad_logits.device), targets[rows]] += grad_log_probs
    factor = options.inverse_temperature * options.scale
    if factor != 1:
        grad_logits.mul_(factor)
    if options.softcap is not None:
        assert logits is not None
        grad_logits.mul_(1 - (logits / (options.softcap * options.inverse_temperature)) ** 2)
    return grad_logits
