"""Tensors without storage, and a counter of the bytes that they would take.

In: code that makes tensors. Out: inside `fake_tensors()` the same operations with shapes and types alone, and a
`LiveBytes` that counts. PyTorch's fake tensors do the work. They live in private modules of torch (2.8 to 2.13), which
only this module imports; `tests/training/memory/test_fake_tensors.py` fails where they change. Deliberately absent:
models (`fake_model`).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves
from transformers import modeling_utils


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Give every tensor that is created inside the block shape and type, and no storage."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("bitsandbytes") is not None:
            stack.enter_context(_real_tables_of_bitsandbytes())
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


def real_tensors() -> contextlib.AbstractContextManager[Any]:
    """Return a context in which tensors have storage again, inside `fake_tensors()`."""
    context: contextlib.AbstractContextManager[Any] = _disable_current_modes()
    return context


@contextlib.contextmanager
def _real_tables_of_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes build the tables whose values it reads, and forget all that it caches inside the block.

    bitsandbytes 0.49 and 0.50 cache tables and optimizer settings for the life of the process: a real run later would
    meet fake ones.
    """
    from bitsandbytes import functional
    from bitsandbytes.optim import GlobalOptimManager

    create_map = functional.create_dynamic_map

    def create_real_map(*args: Any, **kwargs: Any) -> torch.Tensor:
        with real_tensors():
            table: torch.Tensor = create_map(*args, **kwargs)
            return table

    functional.create_dynamic_map = create_real_map
    caches = functional.name2qmap, GlobalOptimManager.get_instance().__dict__
    originals = [{name: copy.copy(value) for name, value in cache.items()} for cache in caches]
    try:
        yield
    finally:
        functional.create_dynamic_map = create_map
        for cache, original in zip(caches, originals, strict=True):
            cache.clear()
            cache.update(original)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that live, from the operations that make them."""

    def __init__(self, labelled: int) -> None:
        """Count from now on.

        Args:
            labelled: How many positions every mask picks: in tensors without values nobody can count them.
        """
        super().__init__()
        self.now = self.peak = 0
        self._labelled = labelled
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and count what it makes."""
        if func is torch.ops.prim.device.default:  # called at every step, and cheap to answer
            return args[0].fake_device
        if func is torch.ops.aten.nonzero.default:  # the number of rows depends on values: at most all
            output = args[0].new_empty((len(args[0]), args[0].dim()), dtype=torch.long)
        else:
            output = func(*self._replace_masks(func, args), **(kwargs or {}))
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return output

    def _replace_masks(self, func: Any, args: Any) -> Any:
        """Return the arguments, in which a mask that picks positions is replaced by so many indices."""
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

    def _count(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed; one that is counted already not again."""
        storage = tensor.untyped_storage()
        key, size = _get_storage_id(storage), storage.nbytes()
        if key in self._storages:
            return

        def forget(_: Any) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)

    def reset_peak(self) -> int:
        """Forget the peak, and return the bytes that live now."""
        self.peak = self.now
        return self.now


class MovedToHost(torch.autograd.graph.saved_tensors_hooks):
    """Keeps what the backward pass needs in the memory of the host, so that it takes no byte of the device."""

    def __init__(self, *_: Any, **__: Any) -> None:
        """Take the arguments of `torch.autograd.graph.save_on_cpu`, whose place this takes."""

        def pack(tensor: torch.Tensor) -> tuple[Any, ...]:
            return tuple(tensor.shape), tensor.stride(), tensor.dtype

        def unpack(saved: tuple[Any, ...]) -> torch.Tensor:
            shape, stride, dtype = saved
            return torch.empty_strided(shape, stride, dtype=dtype)

        super().__init__(pack, unpack)


@contextlib.contextmanager
def offloading_to_host() -> Iterator[None]:
    """Let transformers' checkpoints with `offload: true` leave the counted memory. transformers 5.17 to 5.23."""
    original = modeling_utils.save_on_cpu
    modeling_utils.save_on_cpu = MovedToHost
    try:
        yield
    finally:
        modeling_utils.save_on_cpu = original


def count_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Return the bytes of tensors; a storage that several share counts once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({_get_storage_id(storage): storage.nbytes() for storage in storages}.values())


def _get_storage_id(storage: torch.UntypedStorage) -> int:
    """Return the identity of a storage: fake ones have no address, and Python's objects of them come and go."""
    return int(storage._cdata)
