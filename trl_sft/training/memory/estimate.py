"""Memory of one training step, counted on fake tensors.

In: what a run has before its weights, and the shape of a batch. Out: an `Estimate`. Weights, gradients and the
optimizer's state are those of the whole model. The forward and backward pass runs with a few layers and with twice as
many. If the layers are alike, its bytes are extrapolated linearly; otherwise it runs with all layers. There is no
formula for an architecture: the model's own code runs. Deliberately absent: what an allocator loses between tensors, a
CUDA context, the process itself.
"""

from __future__ import annotations

import contextlib
import gc
from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer

from trl_sft.errors import first_line
from trl_sft.model import patches
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import chunked_loss, fake_model
from trl_sft.training.memory.fake_model import Batch
from trl_sft.training.memory.fake_tensors import LiveBytes, count_bytes, fake_tensors, offloading_to_host
from trl_sft.training.stages import TrainingInputs

_FEW_ROUNDS = 2  # rounds of the layers' pattern that the smaller of two passes runs


class Estimate(NamedTuple):
    """Bytes of one step on one device. The parts do not all live at the same time; `peak` is the most that does."""

    weights: int  # and buffers, and the scales of quantized weights
    gradients: int
    optimizer: int  # its state
    activations: int  # stored for the backward pass
    logits: int  # beside the activations, while head and loss are computed
    peak: int
    missing: str = ""  # why the pass could not be run; activations and logits are then 0
    buffers: int = 0  # of an engine that divides the step, as much as lives at one time: buckets, gathered weights

    @property
    def minimum(self) -> int:
        """Bytes that live together at every update, whatever the batch."""
        return self.weights + self.gradients + self.optimizer


class Update(NamedTuple):
    """Bytes of an update of the whole model."""

    weights: int
    gradients: int
    optimizer: int
    peak: int  # from the first gradient to the end of the update


class Pass(NamedTuple):
    """Bytes of a forward and a backward pass; the peaks are above the weights."""

    activations: int
    logits: int
    forward_peak: int  # until the backward pass of the head is done
    upper_peak: int  # in the backward pass of the upper half of the layers
    lower_peak: int  # in that of the lower half


class CountedPass(NamedTuple):
    """A pass of a model, and the bytes of that model."""

    passed: Pass
    weights: int
    gradients: int


def estimate_step(run: Run, inputs: TrainingInputs, batch: Batch, *, device_type: str) -> Estimate:
    """Estimate what a step of `batch` takes.

    Args:
        run: The checked recipe.
        inputs: What the run has before its weights.
        batch: The shape of the batch.
        device_type: cpu or cuda.

    Raises:
        Exception: Whatever upstream raises for a model that it cannot build.
    """
    is_card = device_type == "cuda"
    head = patches.imitate_triton_head() if is_card else contextlib.nullcontext()
    host = offloading_to_host() if is_card else contextlib.nullcontext()
    is_frozen = gc.get_freeze_count() > 0  # as the command line does once it has imported the packages
    if not is_frozen:
        gc.freeze()  # the garbage collector then skips objects that exist already
    try:
        with fake_tensors(), head, host:
            update = _count_update(run, inputs, batch, device_type=device_type)
            try:
                passed = _count_pass(run, inputs, batch, device_type=device_type, update=update)
            except (
                Exception
            ) as error:  # a model may read values of tensors, for example to route experts, and then raises anything
                missing = f"{type(error).__name__}: {first_line(error)}"
                return Estimate(update.weights, update.gradients, update.optimizer, 0, 0, update.peak, missing)
    finally:
        if not is_frozen:
            gc.unfreeze()
    pass_peak = max(passed.forward_peak, passed.upper_peak, passed.lower_peak)
    peak = max(update.weights + update.optimizer + pass_peak, update.peak)
    return Estimate(update.weights, update.gradients, update.optimizer, passed.activations, passed.logits, peak)


def _count_update(run: Run, inputs: TrainingInputs, batch: Batch, *, device_type: str) -> Update:
    """Return the bytes of one optimizer update of the whole model."""
    with LiveBytes(batch.labelled) as live:
        model = fake_model.build_fake_model(run, inputs, batch, device_type=device_type)
        gc.collect()
        weights = live.now
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        with_gradients = live.reset_peak()
        optimizer = _create_optimizer(model, inputs.args)
        optimizer.step()
        return Update(weights, with_gradients - weights, live.now - with_gradients, live.peak)


def _count_pass(run: Run, inputs: TrainingInputs, batch: Batch, *, device_type: str, update: Update) -> Pass:
    """Return the bytes of a pass of the whole model, extrapolated where its layers are alike."""
    config = inputs.model.config.get_text_config()
    few = _find_pattern(config) * _FEW_ROUNDS
    if config.num_hidden_layers > 3 * few:
        small = _run_pass(run, inputs, batch, device_type=device_type, layers=few)
        large = _run_pass(run, inputs, batch, device_type=device_type, layers=2 * few)
        steps: float = (config.num_hidden_layers - few) / few

        def extrapolate(first: int, second: int) -> int:
            return round(first + (second - first) * steps)

        weights = extrapolate(small.weights, large.weights)
        gradients = extrapolate(small.gradients, large.gradients)
        if (weights, gradients) == (
            update.weights,
            update.gradients,
        ):  # the extrapolation is exact here, so the layers are alike
            return Pass(*map(extrapolate, small.passed, large.passed))
    return _run_pass(run, inputs, batch, device_type=device_type, layers=None).passed


def _find_pattern(text: PretrainedConfig) -> int:
    """Return the number of layers after which the pattern of layer types repeats."""
    lists = [getattr(text, name) for name in fake_model.list_values_by_layer(text)]
    kinds = list(zip(*lists, strict=True)) or [()] * text.num_hidden_layers
    for size in range(1, len(kinds)):
        if all(kind == kinds[index % size] for index, kind in enumerate(kinds)):
            return size
    return len(kinds)


def _run_pass(run: Run, inputs: TrainingInputs, batch: Batch, *, device_type: str, layers: int | None) -> CountedPass:
    """Run a pass of a model of so many layers (None = all), and count it."""
    with LiveBytes(batch.labelled) as live:
        model = fake_model.build_fake_model(run, inputs, batch, device_type=device_type, layers=layers)
        gc.collect()
        weights = live.now
        for _ in range(
            2 if inputs.args.gradient_accumulation_steps > 1 else 1
        ):  # in the second pass, gradients exist already
            passed = _measure_pass(model, inputs.args, batch, live=live, weights=weights)
        gradients = count_bytes(p.grad for p in model.parameters() if p.grad is not None)
        return CountedPass(passed, weights, gradients)


def _measure_pass(model: PreTrainedModel, args: SFTConfig, batch: Batch, *, live: LiveBytes, weights: int) -> Pass:
    """Run one batch forward and backward, and read the counter on the way."""
    base = unwrap_adapter(model)
    tensors = fake_model.build_batch(batch)
    gc.collect()
    start = live.reset_peak()
    peaks: dict[str, int] = {}  # of the parts of the pass, in their order
    before_head = 0

    def end_part(name: str) -> None:
        if name not in peaks:  # activation checkpointing calls the hook a second time, in the backward pass
            peaks[name] = live.peak
            live.reset_peak()

    def after_body(_: Any, __: Any, output: Any) -> None:
        nonlocal before_head
        before_head = live.now
        end_part("body")
        output.last_hidden_state.register_hook(lambda _: end_part("head, backward"))

    def at_half(_: Any, __: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden.register_hook(lambda _: end_part("upper layers, backward"))

    layers = max((m for m in base.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    hooks = [
        base.base_model.register_forward_hook(after_body),
        layers[len(layers) // 2 - 1].register_forward_hook(at_half),
    ]
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast("cpu", dtype, enabled=bool(args.bf16 or args.fp16)):
        loss = _compute_loss(model, tensors, args, labelled=batch.labelled)
    end_part("head")
    stored = live.reset_peak()  # autocast's copies of the weights are freed by now
    loss.backward()
    end_part("lower layers, backward")
    for hook in hooks:
        hook.remove()
    return Pass(
        activations=stored - start,
        logits=max(peaks["head"] - before_head, peaks["head, backward"] - stored),
        forward_peak=max(peaks["body"], peaks["head"], peaks["head, backward"]) - weights,
        upper_peak=peaks["upper layers, backward"] - weights,
        lower_peak=peaks["lower layers, backward"] - weights,
    )


def _compute_loss(model: PreTrainedModel, tensors: dict[str, Any], args: SFTConfig, *, labelled: int) -> torch.Tensor:
    """Return the loss of a batch, by the forward that SFTTrainer calls."""
    if not patches.has_fused_head():
        with chunked_loss.count_chunks(labelled) if chunked_loss.is_used(args) else contextlib.nullcontext():
            loss: torch.Tensor = model(**tensors, use_cache=False).loss
        return loss
    fused_loss: torch.Tensor = -model(**tensors, fused_lm_head=True).log_probs.sum() / 2
    return fused_loss


def _create_optimizer(model: PreTrainedModel, args: SFTConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the Trainer would create, by the Trainer's own code."""
    trainer = SFTTrainer.__new__(SFTTrainer)  # its __init__ would load the model
    trainer.model, trainer.args, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model, args, None, None
    optimizer: torch.optim.Optimizer = trainer.create_optimizer()
    return optimizer
