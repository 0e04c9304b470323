"""Train loss and eval loss by source and by task, from the log-probabilities of tokens that TRL's fused head returns.

In: the live trainer, and the groups that its rows carry. Out: more values in its log: `loss/NAME` with the share
`loss_token_share/NAME` of the tokens with loss, and by task `task_loss/NAME`; of an evaluation the same with `eval_`.
The sum of share times loss is the logged loss; of a mixture of experts it is that with `router_loss` added. The model
sees no group, and weights and losses stay bit by bit as they are. Sums stay on the device until the Trainer logs, so
nothing waits for them. Not here: how rows carry their group (`tokenization.row_groups`).

Upstream's loss is followed as trl 1.16 (`SFTTrainer.compute_loss`) and transformers 5.17 to 5.23 compute it: of each
step the sum over tokens divided by the tokens of the step, then the mean over the steps since the last log entry; of an
evaluation the mean over batches, weighted by their rows. What is added up is compared with the logged loss each time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import trl
from trl import SFTTrainer

from trl_sft import console
from trl_sft.model import patches
from trl_sft.tokenization.row_groups import GROUP_LENGTHS, GROUPS, Grouping, RowGroups
from trl_sft.training.repeated_rows import count_own_rows
from trl_sft.training.verify import Verification

_TRAIN, _EVAL = "train", "eval"
_SHARE = "token_share"
_ROUTER_LOSS = "router_loss"  # what the auxiliary loss of a router adds to the loss
_TOLERANCE = 1e-4  # relative; a larger difference from the logged loss means that upstream computes another loss
_LOSS_TYPES = ("nll", "dft")  # of trl 1.16
_SUMS, _NAMES = "sums", "names"  # in the record of a checkpoint


class GroupCollator:
    """A data collator whose batches also hold `groups`: the group of each token, shaped as the labels."""

    def __init__(self, collate: Callable[[list[dict[str, Any]]], dict[str, Any]]) -> None:
        """Keep the collator that makes the batches."""
        self._collate = collate

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch with `groups`: int16 (rows, tokens)."""
        batch = self._collate(examples)
        if GROUPS not in examples[0]:
            return batch
        labels, is_flattened = batch["labels"], len(batch["labels"]) != len(examples)
        if isinstance(examples[0][GROUPS], int) and not is_flattened:  # padding may have a group: it has no loss
            numbers = torch.tensor([example[GROUPS] for example in examples], dtype=torch.int16)
            return batch | {GROUPS: numbers[:, None].repeat(1, labels.shape[1])}
        rows = [spread_groups(example) for example in examples]
        rows = [torch.cat(rows)] if is_flattened else rows  # without padding all rows lie in one
        groups = torch.zeros(labels.shape, dtype=torch.int16)
        for index, row in enumerate(rows):
            groups[index, : len(row)] = row
        return batch | {GROUPS: groups}


class SourceLosses:
    """Adds up the losses of tokens by group, and logs them beside the loss of all."""

    def __init__(
        self, trainer: SFTTrainer, grouping: Grouping, *, verification: Verification, show: Callable[[str], None]
    ) -> None:
        """Let batches carry groups, and losses be added up and logged.

        Args:
            trainer: the live trainer.
            grouping: the groups that its rows carry.
            verification: knows which passes are no part of the training; they are not added up.
            show: prints a line while the run goes on.

        """
        self._trainer, self._verification, self._notes = trainer, verification, grouping.notes
        parts = dict(grouping.parts)
        self._obstacle = find_obstacle(trainer) if parts else ""
        self._train_groups = parts.pop(_TRAIN, None)
        is_single = not isinstance(trainer.eval_dataset, dict)
        # by the name under which the Trainer logs the loss of an evaluation set
        self._eval_groups = {"eval_loss" if is_single else f"eval_{name}_loss": parts[name] for name in parts}
        self._show = show
        self._is_off = not grouping.parts or bool(self._obstacle)
        self._train_sums: torch.Tensor | None = None  # (groups, 2) since the last log entry: losses, shares of tokens
        self._eval_sums: torch.Tensor | None = None  # (groups, 2) of the evaluation that runs
        self._eval_rows: torch.Tensor | float = 0.0  # which the Trainer counted in it
        self._last_logged = 0  # step
        self._has_all_steps = True  # whether `_train_sums` holds every step since the last log entry
        if not self._is_off:
            self._install(trainer)

    def _install(self, trainer: SFTTrainer) -> None:
        """Replace data collator, `compute_loss` and `log` of the trainer by those that know groups."""
        patches.keep_columns(trainer, (GROUPS, GROUP_LENGTHS))
        trainer.data_collator = GroupCollator(trainer.data_collator)
        trainer.compute_loss = functools.partial(self._compute_loss, trainer.compute_loss)
        trainer.log = functools.partial(self._log, trainer.log)

    def first_screen(self) -> list[tuple[str, str]]:
        """Return lines of the table before step 1: what is logged by source and task, or why it is not."""
        lines = [("losses", note) for note in self._notes]
        if self._obstacle:
            return [*lines, ("losses", f"not logged by source or task: {self._obstacle}")]
        names_by_key: dict[str, dict[str, None]] = {}
        for prefix, groups in (("", self._train_groups), *(("eval_", groups) for groups in self._eval_groups.values())):
            for key, names in groups.names.items() if groups else ():
                names_by_key.setdefault(f"{prefix}{key}/NAME", {}).update(dict.fromkeys(names))
        keys_by_names: dict[tuple[str, ...], list[str]] = {}
        for key, values in names_by_key.items():
            keys_by_names.setdefault(tuple(sorted(values)), []).append(key)
        logged = [f"{' and '.join(keys)} of {console.format_names(names)}" for names, keys in keys_by_names.items()]
        return [*lines, *(("losses", f"logged as {line}") for line in logged)]

    def begin(self, step: int) -> None:
        """Begin to add up anew, as the Trainer does when training begins. `step`: the steps so far."""
        self._train_sums, self._last_logged, self._has_all_steps = None, step, True

    def describe_window(self) -> dict[str, Any]:
        """Return the sums since the last log entry, for the record of a checkpoint; the same on every process."""
        if self._train_sums is None:
            return {}
        return {_NAMES: self._list_train_names(), _SUMS: self._gather(self._train_sums)}

    def restore_window(self, window: Mapping[str, Any], *, last_logged: int) -> None:
        """Go on with the sums of a checkpoint.

        Args:
            window: what `describe_window` returned; of other sources or tasks, or empty, the next log entry goes
                without losses by source.
            last_logged: the step of the last log entry.

        """
        self._last_logged = last_logged
        if self._is_off or self._train_groups is None or last_logged == self._trainer.state.global_step:
            return
        self._has_all_steps = window.get(_NAMES) == self._list_train_names()
        if self._has_all_steps:
            device = self._trainer.args.device
            self._train_sums = torch.tensor(window[_SUMS], dtype=_choose_dtype(device), device=device)

    def _list_train_names(self) -> dict[str, list[str]]:
        assert self._train_groups is not None
        return {key: list(names) for key, names in self._train_groups.names.items()}

    def _compute_loss(
        self, compute: Callable[..., Any], model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Compute the loss as upstream does, without the groups, and add up the losses of tokens by group."""
        groups = inputs.pop(GROUPS, None)
        if groups is None or self._is_off or self._verification.is_paused:
            return compute(model, inputs, *args, **kwargs)
        outputs: list[Any] = []
        # on the outermost module and for this call alone, so that `torch.compile` does not trace it
        hook = model.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        try:
            result = compute(model, inputs, *args, **kwargs)
        finally:
            hook.remove()
        loss = (result[0] if isinstance(result, tuple) else result).detach()
        output = next(output for output in outputs if getattr(output, "log_probs", None) is not None)
        with torch.no_grad():
            if self._trainer.model.training:
                self._add_train(output, groups, loss=loss, num_items=kwargs.get("num_items_in_batch"))
            else:
                self._add_eval(output, groups, loss)
        return result

    def _add_train(self, output: Any, groups: torch.Tensor, *, loss: torch.Tensor, num_items: Any) -> None:
        """Add a micro batch. `num_items`: tokens with loss of the step; None = the loss is the mean of the batch."""
        trainer, args = self._trainer, self._trainer.args
        assert self._train_groups is not None
        steps = trainer.current_gradient_accumulation_steps
        if num_items is None:
            factor = 1 / (_count_tokens(output) * steps)
        else:
            # the tokens of all processes were counted, and the losses of processes are averaged
            processes = trainer.accelerator.num_processes // trainer.get_tp_size()
            tokens = torch.as_tensor(num_items, dtype=_choose_dtype(args.device)).clamp(min=1)
            factor = (processes if args.average_tokens_across_devices else 1) / tokens
        sums = self._sum_by_group(output, groups, self._train_groups, factor=factor, router_factor=1 / steps)
        before = torch.zeros_like(sums) if self._train_sums is None else self._train_sums
        if args.logging_nan_inf_filter:  # the Trainer takes the mean of the earlier losses in place of one that is not
            mean = before / (1 + trainer.state.global_step - self._last_logged)
            sums = torch.where(torch.isfinite(loss), sums, mean)
        self._train_sums = before + sums

    def _add_eval(self, output: Any, groups: torch.Tensor, loss: torch.Tensor) -> None:
        """Add a batch of an evaluation."""
        largest = max(self._eval_groups.values(), key=lambda groups: groups.number)
        rows = self._count_rows()
        sums = self._sum_by_group(output, groups, largest, factor=rows / _count_tokens(output), router_factor=rows)
        counted = torch.as_tensor(rows, dtype=sums.dtype, device=sums.device)
        if self._trainer.args.logging_nan_inf_filter:  # the Trainer leaves out a loss that is not finite
            sums = torch.where(torch.isfinite(loss), sums, torch.zeros_like(sums))
            counted = torch.where(torch.isfinite(loss), counted, torch.zeros_like(counted))
        self._eval_sums = sums if self._eval_sums is None else self._eval_sums + sums
        self._eval_rows = self._eval_rows + counted

    def _count_rows(self) -> float:
        """Return how many rows of the batch the Trainer counts: of the last one those that are not repeated."""
        return float(count_own_rows(self._trainer, self._trainer.args.eval_batch_size))

    def _sum_by_group(
        self, output: Any, groups: torch.Tensor, row_groups: RowGroups, *, factor: torch.Tensor, router_factor: float
    ) -> torch.Tensor:
        """Return the sums of losses and of numbers of tokens, both times `factor`: (groups + 1, 2).

        The last line holds the auxiliary loss of a router, which is of no group, times `router_factor`.
        """
        losses = -output.log_probs.detach()
        if self._trainer.args.loss_type == "dft":  # https://huggingface.co/papers/2508.05629
            losses = losses * (-losses).exp()
        dtype, device = _choose_dtype(losses.device), losses.device
        targets = groups[:, 1:].to(device)
        first = losses.shape[1] - targets.shape[1]  # prompt learning puts positions before those of the row
        flat = targets.reshape(-1).int()
        sums = torch.zeros((2, row_groups.number + 1), dtype=dtype, device=device)
        for line, values in zip(sums, (losses, output.label_mask), strict=True):
            line.index_add_(0, flat, values[:, first:].reshape(-1).to(dtype))
        sums *= factor.to(device, dtype)
        if self._trainer.aux_loss_enabled:
            sums[0, -1] = self._trainer.router_aux_loss_coef * output.aux_loss.detach() * router_factor
        return sums.T

    def _log(self, log: Callable[..., None], logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log as upstream does, with the losses by group."""
        if "loss" in logs and self._train_groups is not None:
            logs.update(self._read_train(self._train_groups, logs["loss"]))
        for key, groups in self._eval_groups.items():
            if key in logs:
                logs.update(self._read_eval(groups, logs[key]))
        log(logs, *args, **kwargs)

    def _read_train(self, groups: RowGroups, logged: float) -> dict[str, float]:
        """Return the losses since the last log entry, and begin a new one. `logged`: the loss of all tokens."""
        sums, self._train_sums = self._train_sums, None
        steps = self._trainer.state.global_step - self._last_logged
        has_all_steps, self._has_all_steps = self._has_all_steps, True
        self._last_logged = self._trainer.state.global_step
        if sums is None or not has_all_steps:
            return {}
        return self._average(self._gather(sums), groups, total=steps, logged=logged)

    def _read_eval(self, groups: RowGroups, logged: float) -> dict[str, float]:
        """Return the losses of the evaluation that ended. `logged`: the loss of all tokens."""
        sums, rows = self._eval_sums, self._eval_rows
        self._eval_sums, self._eval_rows = None, 0.0
        if sums is None:
            return {}
        total = self._gather(torch.as_tensor(rows, dtype=sums.dtype, device=sums.device))
        return self._average(self._gather(sums), groups, total=total, logged=logged, prefix="eval_")

    def _average(
        self, sums: list[list[float]], groups: RowGroups, *, total: float, logged: float, prefix: str = ""
    ) -> dict[str, float]:
        """Return the values to log; none, now and later, if they do not add up to the loss that the Trainer logs.

        Args:
            sums: of losses and of shares of tokens, for each group; the last ones are of no group.
            groups: their names.
            total: the steps of the losses, or the rows of an evaluation.
            logged: the loss of all tokens.
            prefix: `eval_`, or none.

        """
        if not total or not math.isfinite(logged):
            return {}
        whole = sum(loss for loss, _ in sums) / total
        if not math.isclose(whole, logged, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE**2):
            self._is_off = True
            self._show(
                f"note      losses by source are logged no more: they add up to {whole:.6g}, not to {logged:.6g}"
            )
            return {}
        losses: dict[str, float] = {}
        shares: dict[str, float] = {}
        for key, names in groups.names.items():
            for name, (loss, tokens) in average_by_name(sums, names, total).items():
                losses[f"{prefix}{key}/{name}"] = loss
                shares[f"{prefix}{key}_{_SHARE}/{name}"] = tokens
        router = sums[-1][0] / total
        return losses | shares | ({f"{prefix}{_ROUTER_LOSS}": router} if router else {})

    def _gather(self, values: torch.Tensor) -> Any:
        """Return the mean of a tensor over all processes, as numbers."""
        return self._trainer.accelerator.reduce(values, "mean").tolist()


def average_by_name(
    sums: Sequence[Sequence[float]], names: Sequence[str], total: float
) -> dict[str, tuple[float, float]]:
    """Return for each name its mean loss of a token, and its share of the tokens with loss.

    Args:
        sums: of losses and of shares of tokens, for each group.
        names: the name of each group; groups of one name count together, and one without tokens has no loss.
        total: by which the sums are divided to get the loss of all.

    """
    added: dict[str, tuple[float, float]] = {}
    for name, (loss, share) in zip(names, sums, strict=False):
        before = added.get(name, (0.0, 0.0))
        added[name] = before[0] + loss, before[1] + share
    return {name: (loss / share, share / total) for name, (loss, share) in added.items() if share}


def spread_groups(example: Mapping[str, Any]) -> torch.Tensor:
    """Return the group of each token of a row or a pack: int16 (tokens,)."""
    groups = torch.tensor(example[GROUPS], dtype=torch.int16)
    if GROUP_LENGTHS in example:
        return groups.repeat_interleave(torch.tensor(example[GROUP_LENGTHS]))
    return groups.expand(len(example["input_ids"]))  # one number for all tokens, or one for each


def find_obstacle(trainer: SFTTrainer) -> str:
    """Return why the losses of tokens cannot be told apart; "" if they can."""
    args = trainer.args
    if not patches.has_fused_head():
        return f"TRL {trl.__version__} returns no loss of each token. Install trl>=1.16"
    if args.loss_type not in _LOSS_TYPES:
        return f"train.loss_type {args.loss_type} is not the sum of the losses of tokens"
    if args.label_smoothing_factor > 0 and args.loss_type == "nll":
        return "with train.label_smoothing_factor the loss is not the sum of the losses of tokens"
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        return "with context or sequence parallelism a process has parts of rows"
    if args.n_gpu > 1:
        return "one process trains on several GPUs. Start one process for each with torchrun"
    return ""


def _count_tokens(output: Any) -> torch.Tensor:
    """Return the tokens with loss of a batch, at least 1, in the dtype of sums."""
    tokens: torch.Tensor = output.label_mask.sum().clamp(min=1)
    return tokens.to(_choose_dtype(tokens.device))


def _choose_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of sums: float32 would lose digits over many tokens, and Apple's MPS has no other."""
    return torch.float32 if device.type == "mps" else torch.float64
