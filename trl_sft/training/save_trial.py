"""A save and a load before step 1, so that saving cannot fail for the first time after hours.

Inputs: the checked recipe, and a trainer whose engine and optimizer exist. Outputs: a `SaveTrial` with its line for the
screen, or a fault in every process: too little space, an engine that saves no weights or other ones than it trains. A
checkpoint of up to `WHOLE_BYTES` is saved whole, by the functions that save the later ones; of a larger one only a part
of the weights is gathered and written, and the optimizer's state is not. All of it lies in a folder inside the run
folder, and is removed.
Deliberately absent: whether all processes see the run folder (`shared_folder`), an upload to the hub or to a mirror,
and loading by `from_pretrained`, which takes the memory of a second model.

Private parts of upstream, written for transformers 5.17 to 5.23: `Trainer._save_optimizer_and_scheduler` and
`_save_rng_state`, which save a checkpoint.
"""

from __future__ import annotations

import importlib
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from trl import SFTTrainer

from trl_sft import ranks, run_folder
from trl_sft.console import format_bytes
from trl_sft.errors import Fault, LaunchError
from trl_sft.model.load import unwrap_adapter
from trl_sft.recipe.checked import Run
from trl_sft.training import live

WHOLE_BYTES = 2 * 2**30  # a checkpoint of up to this size is tried whole: a few seconds
PART_BYTES = 64 * 2**20  # of the weights of a larger one
_PART = "part.safetensors"
_FEWEST = 0.9  # share of the live weights that a saved model has at least; tied ones count once
_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # parts of live names that saved ones lack
_ADAPTER_PARTS = (".default", ".modules_to_save")  # the same under peft


class SavedSizes(NamedTuple):
    """Bytes of what a run saves, as the engine of the run writes it."""

    model: int  # the model or the adapter at the end
    checkpoint: int  # each checkpoint; 0 = the run saves none
    gathered: int  # weights that the first process has at once while it saves


class Digest(NamedTuple):
    """What tells whether two tensors are equal, added up over the processes that hold parts of one."""

    bits: int  # sum of the bits as whole numbers, modulo 2**64
    elements: int
    dtype: torch.dtype


class SaveTrial(NamedTuple):
    """What a trial wrote, read back and compared."""

    sizes: SavedSizes
    written: int  # bytes
    compared: int  # bytes of weights that were read back and are equal to the live ones
    free: int  # bytes of the disk
    seconds: float
    is_whole: bool
    has_optimizer: bool  # whether its state was saved too

    def describe(self) -> str:
        """Return what a checkpoint takes, and what was tried."""
        size = f"the model at the end takes about {format_bytes(self.sizes.model)}"
        if self.sizes.checkpoint:
            size = f"a checkpoint takes about {format_bytes(self.sizes.checkpoint)}, {size}"
        tried = "a whole one" if self.is_whole and self.has_optimizer else "a model without optimizer state"
        tried = tried if self.is_whole else "a part of the weights, no optimizer state"
        text = f"{size}; {format_bytes(self.free)} free. Tried: {tried}, {format_bytes(self.written)} written"
        text += f", {format_bytes(self.compared)} of weights read back and equal" if self.compared else ""
        return f"{text}, in {self.seconds:.1f} s"

    def as_json(self) -> dict[str, Any]:
        """Return the entry of run.json."""
        return self.sizes._asdict() | {name: value for name, value in self._asdict().items() if name != "sizes"}


def try_save(run: Run, trainer: SFTTrainer) -> SaveTrial:
    """Save before step 1 as the run will save later, read the weights back, and remove all of it.

    Every process calls it. The trainer is as it was before, also its random states.

    Args:
        run: the checked recipe.
        trainer: the live trainer, once training begins.

    Raises:
        LaunchError: the disk is too small, or what was saved is not what is trained.
            OSError: the disk refuses.

    """
    began = time.monotonic()
    folder = run.output_dir / run_folder.SAVE_TRIAL
    try:
        ranks.share(lambda: _make_folder(folder))
        sizes, free = estimate_sizes(trainer), ranks.share(lambda: shutil.disk_usage(run.output_dir).free)
        _check_space(run, sizes, free)
        digests = digest_weights(trainer)
        is_whole = max(sizes.checkpoint, sizes.model, sizes.gathered) <= WHOLE_BYTES
        has_optimizer = _save_whole(trainer, folder, sizes) if is_whole else False
        if not is_whole:
            _save_part(trainer, folder)
        ranks.wait()
        compared = ranks.share(lambda: _compare(run, trainer, folder, digests=digests, is_whole=is_whole))
        written = ranks.share(lambda: sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
    finally:
        if ranks.is_first():
            run_folder.remove_save_trial(run.output_dir)
    return SaveTrial(sizes, written, compared, free, round(time.monotonic() - began, 3), is_whole, has_optimizer)


def estimate_sizes(trainer: SFTTrainer) -> SavedSizes:
    """Return the bytes of what a run saves: Adam's two numbers for each trained one, and what the engine adds."""
    model, args, engine = trainer.model, trainer.args, live.live_engine(trainer)
    is_adapter = hasattr(model, "peft_config")
    all_bytes = sum(map(_count_bytes, model.parameters()))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    of_trained = sum(map(_count_bytes, trained))
    saved = of_trained if is_adapter else all_bytes
    gathered = all_bytes if engine == live.FSDP else saved
    if args.save_strategy.value == "no":
        return SavedSizes(saved, 0, gathered)
    if args.save_only_model:
        return SavedSizes(saved, saved, gathered)
    elements = sum(map(_count_elements, trained))
    state = 2 * elements if "8bit" in str(args.optim) else 2 * of_trained
    if engine.startswith(live.ZERO):  # float32 weights beside Adam's numbers; stages 1 and 2 write the weights again
        state = 12 * elements + (0 if engine.endswith("3") else saved)
    elif engine == live.FSDP:  # torch's file beside that of transformers
        state += saved
    return SavedSizes(saved, saved + state, gathered)


def digest_weights(trainer: SFTTrainer) -> dict[str, Digest]:
    """Return the digest of each parameter that a run saves, by its saved name; the same in every process."""
    model = trainer.model
    is_adapter = hasattr(model, "peft_config")
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not is_adapter]
    bits = torch.zeros(len(parameters), dtype=torch.int64)
    is_divided = torch.zeros(len(parameters), dtype=torch.bool)
    for index, (_, parameter) in enumerate(parameters):
        part, is_divided[index] = _get_own_part(parameter)
        bits[index] = _sum_bits(part)
    if is_divided.any() and ranks.is_connected():
        added = trainer.accelerator.reduce(bits.to(trainer.args.device), "sum").cpu()
        bits = torch.where(is_divided, added, bits)
    return {
        _get_saved_name(name, is_adapter=is_adapter): Digest(int(bits[index]), _count_elements(p), p.dtype)
        for index, (name, p) in enumerate(parameters)
    }


def _make_folder(folder: Path) -> None:
    """Make an empty folder."""
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    folder.mkdir(parents=True)


def _check_space(run: Run, sizes: SavedSizes, free: int) -> None:
    """Refuse a disk that cannot hold the model at the end beside one checkpoint. Raises LaunchError."""
    if sizes.model + sizes.checkpoint <= free:
        return
    problem = f"a checkpoint takes about {format_bytes(sizes.checkpoint)} and the model at the end"
    problem = problem if sizes.checkpoint else "the model at the end takes about"
    problem += f" {format_bytes(sizes.model)}, and {run.output_dir} has {format_bytes(free)} free"
    fix = "Free space there, or set `train.output_dir` to a folder on another disk."
    where = run.recipe.where(("train", "output_dir"))
    raise LaunchError(Fault(where, problem, fix, code="machine.too_little_disk"))


def _save_whole(trainer: SFTTrainer, folder: Path, sizes: SavedSizes) -> bool:
    """Save a whole checkpoint as the Trainer does; return whether the optimizer's state is part of it."""
    trainer.save_model(str(folder), _internal_call=True)
    if not sizes.checkpoint or trainer.args.save_only_model:
        return False
    trainer._save_rng_state(str(folder))
    optimizer = trainer.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    # torch makes the state of FSDP's optimizer by a step without a learning rate, which is sure to do nothing for Adam
    if live.live_engine(trainer) == live.FSDP and not (isinstance(inner, torch.optim.Adam) and not trainer.args.fp16):
        return False
    was_empty = not getattr(inner, "state", None)
    trainer._save_optimizer_and_scheduler(str(folder))
    if was_empty and live.live_engine(trainer) == live.FSDP:
        inner.state.clear()
    return True


def _save_part(trainer: SFTTrainer, folder: Path) -> None:
    """Save configuration, tokenizer and arguments, and gather and write weights of `PART_BYTES` at most."""
    model = trainer.model
    is_adapter = hasattr(model, "peft_config")
    saved = [(name, p) for name, p in model.named_parameters() if p.requires_grad or not is_adapter]
    chosen, total = [], 0
    for name, parameter in saved:
        if total + _count_bytes(parameter) <= PART_BYTES:
            chosen.append((name, parameter))
            total += _count_bytes(parameter)
    chosen = chosen or [min(saved, key=lambda pair: _count_bytes(pair[1]))]
    part = {_get_saved_name(name, is_adapter=is_adapter): _gather(parameter) for name, parameter in chosen}
    if trainer.args.save_strategy.value != "no":
        trainer._save_rng_state(str(folder))
    if not ranks.is_first():
        return
    save_file(part, folder / _PART)
    unwrap_adapter(model).config.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    trainer.processing_class.save_pretrained(folder)
    torch.save(trainer.args, folder / "training_args.bin")


def _gather(parameter: Any) -> torch.Tensor:
    """Return a parameter whole, on the CPU; every process calls it."""
    if hasattr(parameter, "ds_id"):
        deepspeed = importlib.import_module("deepspeed")  # which made the parameter
        with deepspeed.zero.GatheredParameters([parameter]):
            return torch.clone(parameter.detach().cpu(), memory_format=torch.contiguous_format)
    whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # FSDP2
    return torch.clone(whole.detach().cpu(), memory_format=torch.contiguous_format)


def _compare(run: Run, trainer: SFTTrainer, folder: Path, *, digests: dict[str, Digest], is_whole: bool) -> int:
    """Return the bytes of saved weights that are equal to the live ones. Raises LaunchError for others, or none."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise LaunchError(_describe_no_weights(run, trainer, folder))
    saved = dict(_digest_files(files))
    different = [
        name
        for name, now in saved.items()
        if name in digests and (now.elements != digests[name].elements or _is_other(now, digests[name]))
    ]
    where = run.recipe.where(("launch", "engine"))
    fix = "Use another `launch.engine`, and report this to its library: the saved model would be another one."
    if different:
        problem = f"{live.live_engine(trainer)} saves other weights than it trains: {_name_few(different)}"
        raise LaunchError(Fault(where, problem, fix, code="run.unsavable"))
    elements, expected = (sum(digest.elements for digest in part.values()) for part in (saved, digests))
    if is_whole and elements < _FEWEST * expected:
        problem = f"{live.live_engine(trainer)} saves {elements:,} of {expected:,} weights"
        raise LaunchError(Fault(where, problem, fix, code="run.unsavable"))
    same = [now for name, now in saved.items() if name in digests and now.dtype == digests[name].dtype]
    return sum(now.elements * now.dtype.itemsize for now in same)


def _is_other(saved: Digest, now: Digest) -> bool:
    """Tell whether two digests of one dtype differ; a tensor that is saved in another dtype is not compared."""
    return saved.dtype == now.dtype and saved.bits != now.bits


def _describe_no_weights(run: Run, trainer: SFTTrainer, folder: Path) -> Fault:
    """Return the fault of an engine that wrote no file of weights that transformers loads."""
    engine = live.live_engine(trainer)
    names = sorted(path.name for path in folder.iterdir())
    problem = f"{engine} saves no weights that transformers can load, only {_name_few(names)}"
    key = "stage3_gather_16bit_weights_on_model_save"
    fix = f"Set `zero_optimization.{key}: true` in the configuration of DeepSpeed."
    if engine == live.FSDP:
        fix = "Remove `state_dict_type` from `launch.config`, or set it to FULL_STATE_DICT."
    return Fault(run.recipe.where(("launch", "config")), problem, fix, code="run.unsavable")


def _digest_files(files: list[Path]) -> Iterator[tuple[str, Digest]]:
    """Yield name and digest of each tensor in files of safetensors."""
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (it is no dict)
                tensor = file.get_tensor(name)
                yield name, Digest(_sum_bits(tensor), tensor.numel(), tensor.dtype)


def _get_own_part(parameter: Any) -> tuple[torch.Tensor, bool]:
    """Return the elements of a parameter that this process adds to its digest, and whether others add theirs."""
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3 divides the elements in order, and fills up the last part
        size, start = parameter.ds_tensor.numel(), ranks.get_number() * parameter.ds_tensor.numel()
        own = max(0, min(size, parameter.ds_numel - start))
        return parameter.ds_tensor.detach().reshape(-1)[:own], True
    if hasattr(parameter, "to_local"):  # FSDP2, or tensor parallelism
        local, mesh = parameter.detach().to_local(), parameter.device_mesh
        coordinates = mesh.get_coordinate() or [0] * mesh.ndim
        placed = zip(parameter.placements, coordinates, strict=True)
        copies = [place.is_replicate() and number > 0 for place, number in placed]
        return local.reshape(-1)[:0] if any(copies) else local.reshape(-1), True
    return parameter.detach().reshape(-1), False


def _sum_bits(tensor: torch.Tensor) -> int:
    """Return the sum of the bits of a tensor as whole numbers: the order of its elements makes no difference."""
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.contiguous().view(kind).sum(dtype=torch.int64)) if tensor.numel() else 0


def _count_elements(parameter: Any) -> int:
    """Return the elements of a parameter over all processes."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _count_bytes(parameter: Any) -> int:
    """Return the bytes of a parameter over all processes."""
    return _count_elements(parameter) * int(parameter.element_size())


def _get_saved_name(name: str, *, is_adapter: bool) -> str:
    """Return the name under which a live parameter is saved, where upstream does not rename it further."""
    for part in (*_WRAPPERS, *(_ADAPTER_PARTS if is_adapter else ())):
        name = name.replace(part, "")
    return name


def _name_few(names: list[str]) -> str:
    """Return the first names of a list."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
