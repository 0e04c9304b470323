"""The signals of every training row: losses under base and trained model, agreement of gradients.

Inputs: a `ShortRun` and the folder of its weights. Outputs: `RowSignals`, and suspects by signal. Not here: conflicts
of answers (`building.audit.answer_conflicts`), and thresholds (`suspects.signals`).
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedModel

from trl_sft.model import cpu_loss
from trl_sft.row_progress import RowProgress
from trl_sft.serving import model_loading
from trl_sft.serving.model_folder import ModelFolder
from trl_sft.suspects import gradient_agreement, signals, token_rows
from trl_sft.suspects.short_run import ShortRun
from trl_sft.suspects.signals import Suspect
from trl_sft.suspects.token_rows import TokenRow


@dataclass(frozen=True)
class RowSignals:
    """Values of training rows, and of the held-out rows that choose: (rows,) each."""

    base_losses: np.ndarray  # of training rows, under the base model
    losses: np.ndarray  # of training rows, under the trained model
    agreements: np.ndarray  # of training rows with the held-out rows that choose
    held_out_losses: np.ndarray
    held_out_agreements: np.ndarray  # each with the other half of these rows


def measure_signals(short: ShortRun, source: ModelFolder, *, trusts_code: bool) -> RowSignals:
    """Measure all signals that need a model; base and trained model are loaded one after the other."""
    tokenizer = model_loading.load_tokenizer(source, trusts_code=trusts_code)
    gib = short.run.options.get("logits_gib", cpu_loss.LOGITS_GIB)
    rows, held_out = short.train.rows, short.choosing.rows
    with RowProgress("Measuring signals", 4 * len(rows) + 3 * len(held_out)) as progress:

        def measure(model: PreTrainedModel, part: Sequence[TokenRow]) -> np.ndarray:
            return token_rows.measure_losses(model, part, logits_gib=gib, count=progress.update)

        model = model_loading.load_base(source, tokenizer, trusts_code=trusts_code)
        base_losses = measure(model, rows)
        del model
        gc.collect()
        model = model_loading.load_model(source, tokenizer, trusts_code=trusts_code)
        losses, held_out_losses = measure(model, rows), measure(model, held_out)
        agreements, held_out_agreements = gradient_agreement.measure_agreement(
            model, rows, held_out, logits_gib=gib, count=progress.update
        )
    return RowSignals(base_losses, losses, agreements, held_out_losses, held_out_agreements)


def choose_suspects(short: ShortRun, measured: RowSignals, conflicts: Mapping[int, str]) -> dict[str, list[Suspect]]:
    """Return the suspects by signal, at most a fifth of the rows for each.

    Args:
        short: the run.
        measured: its signals.
        conflicts: numbers of the rows whose prompt has several answers.

    """
    kinds, own = short.train.kinds, short.choosing.kinds
    places = [place for place, row in enumerate(short.train.rows) if row.number in conflicts]
    most = int(signals.MOST_SHARE * len(short.train.rows))
    return {
        signals.LOSS: signals.choose_suspects(measured.losses, kinds, measured.held_out_losses, held_out_kinds=own),
        signals.GRADIENT: signals.choose_suspects(
            -measured.agreements, kinds, -measured.held_out_agreements, held_out_kinds=own, least_bound=0.0
        ),
        signals.CONFLICT: [Suspect(place, 1.0, 0.0) for place in places[:most]],
    }
