"""One step of training on tensors without storage, its bytes counted.

In: what is known of a run, the shape of a batch. Out: an `Estimate`. Weights, gradients and the optimizer's
state are those of the whole model. The forward and backward pass is carried out with few layers and twice as
many, and goes on linearly from there where the layers are alike; else with all. No formula of an architecture
stands here: its own code runs. Absent: what an allocator loses between tensors, a CUDA context, the process.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from trl import SFTConfig, SFTTrainer
from trl.trainer import utils

from trl_sft.errors import first_line
from trl_sft.model import patches
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.training.memory import fake_model
from trl_sft.training.memory.fake_model import Batch
from trl_sft.training.stages import TrainingInputs

_FEW = 2  # layers, or so many rounds of a pattern of layers


class Estimate(NamedTuple):
    """Bytes of one step on one device. The parts do not all live at once: `peak` is what does at most."""

    weights: int  # and buffers, and the scales of quantized weights
    gradients: int
    optimizer: int  # its state
    activations: int  # kept for the backward pass
    logits: int  # beside them while the head and the loss are worked out
    peak: int
    missing: str = ""  # why the pass could not be carried out: activations and logits are then 0

    @property
    def certain(self) -> int:
        """Bytes that live together at every update."""
        return self.weights + self.gradients + self.optimizer


class Pass(NamedTuple):
    """Bytes of a forward and a backward pass, above the weights."""

    activations: int
    logits: int
    forward: int  # at most until the head is left again
    upper: int  # at most in the backward pass of the upper half of the layers; grows evenly with their number
    lower: int


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that live, from the operations that make them."""

    def __init__(self, labelled: int) -> None:
        """`labelled` positions answer every mask: in tensors without values nobody can count them."""
        super().__init__()
        self.now = self.peak = 0
        self._labelled = labelled
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and see what it made."""
        if func is torch.ops.prim.device.default:  # asked for at every step, and known
            return args[0].fake_device
        if func is torch.ops.aten.nonzero.default:  # which rows are so: at most all
            made = args[0].new_empty((len(args[0]), args[0].dim()), dtype=torch.long)
        else:
            made = func(*self._places(func, args), **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self._see(leaf)
        return made

    def _places(self, func: Any, args: Any) -> Any:
        """Return the arguments with so many places for a mask that picks positions."""
        if "index" not in func.__name__ or len(args) < 2 or not isinstance(args[1], list | tuple):
            return args
        indices: list[Any] = []
        for index in args[1]:
            if isinstance(index, torch.Tensor) and index.dtype == torch.bool:
                size = min(self._labelled, index.numel())
                indices += [index.new_empty(size, dtype=torch.long) for _ in range(index.dim())]
            else:
                indices.append(index)
        return (args[0], indices, *args[2:])

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            del self._known[key]
            self.now -= size

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def restart(self) -> int:
        """Return what lives, and forget the peak."""
        self.peak = self.now
        return self.now


def estimate(run: Run, inputs: TrainingInputs, batch: Batch, kind: str) -> Estimate:
    """Return what a step takes on a device of `kind` (cpu, cuda).

    Raises what upstream raises for a model that it cannot make.
    """
    gc.freeze()  # what lives already need not be looked through each time
    try:
        triton = patches.imitate_triton_head() if kind == "cuda" else contextlib.nullcontext()
        with fake_model.tensors(), triton:
            weights, gradients, state, stepped = _update(run, inputs, batch, kind)
            try:
                found = _passed(run, inputs, batch, kind, (weights, gradients))
            except Exception as error:  # whatever a model raises that asks for values, as experts may
                missing = f"{type(error).__name__}: {first_line(error)}"
                return Estimate(weights, gradients, state, 0, 0, stepped, missing)
    finally:
        gc.unfreeze()
    peak = max(weights + state + max(found[2:]), stepped)
    return Estimate(weights, gradients, state, found.activations, found.logits, peak)


def _update(run: Run, inputs: TrainingInputs, batch: Batch, kind: str) -> tuple[int, int, int, int]:
    """Return bytes of weights, gradients, the optimizer's state, and at most during an update of the whole model."""
    with Live(batch.labelled) as live:
        model = fake_model.model(run, inputs, batch, kind)
        gc.collect()
        weights = live.now
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)
        before = live.restart()
        optimizer = _optimizer(model, inputs.args)
        optimizer.step()
        return weights, before - weights, live.now - before, live.peak


def _passed(run: Run, inputs: TrainingInputs, batch: Batch, kind: str, whole: tuple[int, int]) -> Pass:
    """Return the bytes of a pass of the whole model, of which weights and gradients are inputs."""
    config = inputs.model.config.get_text_config()
    few = _round(config) * _FEW
    if config.num_hidden_layers > 3 * few:
        (one, at_one), (two, at_two) = (_counted(run, inputs, batch, kind, layers) for layers in (few, 2 * few))
        times: float = (config.num_hidden_layers - few) / few

        def further(first: int, second: int) -> int:
            return round(first + (second - first) * times)

        if tuple(map(further, at_one, at_two)) == whole:  # so the layers are alike
            return Pass(*map(further, one, two))
    return _counted(run, inputs, batch, kind, None)[0]


def _round(text: PretrainedConfig) -> int:
    """Return after how many layers their pattern begins anew."""
    lists = [getattr(text, name) for name in fake_model.listed(text)]
    kinds = list(zip(*lists, strict=True)) or [()] * text.num_hidden_layers
    size = len(kinds)
    return next(n for n in range(1, size + 1) if all(kinds[i] == kinds[i % n] for i in range(size)))


def _counted(
    run: Run, inputs: TrainingInputs, batch: Batch, kind: str, layers: int | None
) -> tuple[Pass, tuple[int, int]]:
    """Carry out a pass of a model of so many layers; return its bytes, and those of weights and gradients."""
    with Live(batch.labelled) as live:
        model = fake_model.model(run, inputs, batch, kind, layers)
        gc.collect()
        weights = live.now
        for _ in range(2 if inputs.args.gradient_accumulation_steps > 1 else 1):  # the second meets gradients
            found = _pass(model, inputs.args, batch, live, weights)
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return found, (weights, _bytes(gradients))


def _pass(model: PreTrainedModel, args: SFTConfig, batch: Batch, live: Live, weights: int) -> Pass:
    """Carry out one batch, forward and backward, and count on the way."""
    base = unwrap_adapter(model)
    given = fake_model.inputs(batch)
    gc.collect()
    start = live.restart()
    most: dict[str, int] = {}  # peaks of the parts of the pass, in their order

    def reached(part: str) -> None:
        if part not in most:  # what is worked out again in the backward pass is met twice
            most[part] = live.peak
            live.restart()

    def below(_: Any, __: Any, out: Any) -> None:
        most["start of the head"] = live.now
        reached("body")
        out.last_hidden_state.register_hook(lambda _: reached("head, backward"))

    def halfway(_: Any, __: Any, out: Any) -> None:
        (out[0] if isinstance(out, tuple) else out).register_hook(lambda _: reached("upper"))

    layers = max((m for m in base.modules() if isinstance(m, torch.nn.ModuleList)), key=len)
    hooks = [base.base_model.register_forward_hook(below), layers[len(layers) // 2 - 1].register_forward_hook(halfway)]
    dtype = torch.bfloat16 if args.bf16 else torch.float16
    with torch.autocast("cpu", dtype, enabled=bool(args.bf16 or args.fp16)):
        loss = _loss(model, given)
    reached("head")
    kept = live.restart()  # autocast's copies of the weights are gone by now
    loss.backward()
    reached("lower")
    for hook in hooks:
        hook.remove()
    logits = max(most["head"] - most["start of the head"], most["head, backward"] - kept)
    forward = max(most["body"], most["head"], most["head, backward"])
    return Pass(kept - start, logits, *(peak - weights for peak in (forward, most["upper"], most["lower"])))


def _loss(model: PreTrainedModel, given: dict[str, Any]) -> torch.Tensor:
    """Return the loss of a batch, by the forward that SFTTrainer calls."""
    if not hasattr(utils, "add_fused_lm_head"):
        plain: torch.Tensor = model(**given, use_cache=False).loss
        return plain
    found: torch.Tensor = -model(**given, fused_lm_head=True).log_probs.sum() / 2
    return found


def _optimizer(model: PreTrainedModel, args: SFTConfig) -> torch.optim.Optimizer:
    """Return the optimizer that the Trainer would make, made by the Trainer's own code."""
    trainer = SFTTrainer.__new__(SFTTrainer)
    trainer.model, trainer.args, trainer.optimizer, trainer.optimizer_cls_and_kwargs = model, args, None, None
    made: torch.optim.Optimizer = trainer.create_optimizer()
    return made


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors, shared storages once."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
