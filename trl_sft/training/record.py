"""The files that a run writes into its folder during the run: run.json, the recipe, the ledger, rows.

In: the run's inputs and its live trainer. Out: files, each whole or absent. Nothing is written before
`RunRecord.begin`, so a refused run changes no folder. The contents come from `manifest`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from typing import Any

import torch
from trl import SFTTrainer

from trl_sft import checkpoints, console, earlier_run, ranks, run_folder
from trl_sft.publishing import base_license, card_facts, model_card
from trl_sft.recipe import resolved, yaml_reader
from trl_sft.recipe.checked import Run
from trl_sft.recipe.folder_decision import FolderDecision
from trl_sft.tokenization import segmentation, stream
from trl_sft.training import inference_record, manifest
from trl_sft.training.early_stopping import EarlyStopping
from trl_sft.training.generation_metric import GenerationMetric
from trl_sft.training.monitor import Monitor
from trl_sft.training.progress import Progress
from trl_sft.training.stages import TrainingInputs
from trl_sft.training.throughput import Throughput
from trl_sft.training.verify import Verification

_ROWS_SHOWN = 3  # of each source, in rows.jsonl


class RunRecord:
    """The record of a running run: it writes the files and knows what failures report."""

    def __init__(self, run: Run, decision: FolderDecision) -> None:
        """Start the clock; trainer and verification follow when they exist."""
        self.trainer: SFTTrainer | None = None
        self.verification: Verification | None = None
        self.progress: Progress | None = None
        self.throughput: Throughput | None = None
        self.monitor: Monitor | None = None
        self.stopping: EarlyStopping | None = None
        self.answer_metric: GenerationMetric | None = None
        self.checkpoint = decision.checkpoint  # that the run resumes from
        self.largest_batch: tuple[int, ...] = ()  # so far: rows, tokens
        self.in_training = True  # whether the last batch was one to train, not to evaluate
        self._run, self._decision = run, decision
        self._inputs: TrainingInputs | None = None
        self._entries: dict[str, Any] = {}
        self._started = time.monotonic()

    @property
    def has_begun(self) -> bool:
        """Whether the run folder is this run's."""
        return bool(self._entries)

    def begin(self, inputs: TrainingInputs, entries: dict[str, Any]) -> None:
        """Start writing into the run folder. An earlier run that may be replaced is set aside only now.

        Args:
            inputs: of the run.
            entries: what a later process compares, for run.json.

        """
        if not ranks.is_first():
            self._entries = dict(entries)
            self._watch_batches()
            return
        run, folder = self._run, self._run.output_dir
        if self._decision.replaces_earlier and (aside := earlier_run.set_aside(folder)):
            console.say(f"earlier   the run that this one replaces is in {aside} until this one is finished")
        run_folder.remove_left_overs(folder)
        if self._decision.passed_over:
            checkpoints.set_aside(self._decision.passed_over)
        assert self.trainer is not None
        thoughts = inputs.datasets.encoder.thoughts
        if thoughts is not None and self.verification:
            answers = inputs.datasets.ledger["train"].get("answers")  # of a stream they stand in ledger.json
            thinking = {"generation_prompt": thoughts.generation_prompt, "answers": answers}
            self.verification.measured["thinking"] = thinking
        measured = {"measured": self.verification.measured} if self.verification else {}
        self._entries = manifest.describe_start(run, inputs.settings.chosen, self.trainer.args) | entries | measured
        self._entries |= inference_record.describe_inference(run, inputs)
        self._write({})
        run_folder.write_text(folder / run_folder.RECIPE, yaml_reader.mask_secrets(run.recipe.text))
        run_folder.write_text(folder / run_folder.RESOLVED, resolved.format_recipe(run, inputs.settings.chosen))
        self._inputs = inputs
        self._watch_batches()
        self._write_ledger()
        self._write_first_rows()
        for path, damage in self._decision.passed_over.damaged if self._decision.passed_over else ():
            console.say(f"resume    {path.name} is passed over: {damage}; it is now {checkpoints.DAMAGED}{path.name}")
        for path in self._decision.passed_over.unfinished if self._decision.passed_over else ():
            console.say(f"resume    {path.name} was not written to its end and is removed")
        if self.checkpoint:
            console.say(f"resume    from {self.checkpoint}")
            if earlier_run.is_set_aside(folder):
                console.say(f"earlier   the run that this one replaces is in {folder / run_folder.EARLIER_RUN}")

    def write_card(self, entries: dict[str, Any]) -> None:
        """Write the model card of the run, once its other files are written; `entries` are the last of run.json."""
        seconds = {"seconds": round(self.seconds(), 1)}
        facts = card_facts.read_facts(self._run.output_dir)
        facts = dataclasses.replace(facts, run=self._entries | entries | seconds)
        license_of_base = base_license.find_license(facts.base, is_online=False)
        card = model_card.write_model_card(facts, base_license=license_of_base)
        run_folder.write_text(self._run.output_dir / run_folder.CARD, card)

    def close(self, entries: dict[str, Any]) -> None:
        """Write down how the run ended. A run that is done stays done, whatever fails after that."""
        if ranks.is_first() and self.has_begun and self._entries.get("outcome") != run_folder.DONE:
            throughput = self.throughput.describe() if self.throughput else {}
            findings = self.monitor.list_findings() if self.monitor else []
            log = self.trainer.state.log_history if self.trainer else []
            phases = self.monitor.list_phases(log) if self.monitor else []
            entries = entries | ({"answer_metric": self.answer_metric.describe()} if self.answer_metric else {})
            entries |= {"findings": findings, "phases": phases, "throughput": throughput}
            self._write(entries | {"seconds": round(self.seconds(), 1)})

    def add_push(self, pushed: dict[str, Any]) -> None:
        """Write down what a finished run pushed to the hub."""
        self._write({"pushed": pushed})

    def seconds(self) -> float:
        """Return the wall time since the inputs were ready."""
        return time.monotonic() - self._started

    def show(self, text: str) -> None:
        """Show one line, above the live line where there is one."""
        show = self.progress.show if self.progress else console.say
        show(text)

    def _watch_batches(self) -> None:
        """Note the shape of each batch from now on."""
        assert self.trainer is not None
        self.trainer.model.register_forward_pre_hook(self._note_batch, with_kwargs=True)

    def _note_batch(self, model: torch.nn.Module, arguments: tuple[Any, ...], batch: dict[str, Any]) -> None:
        """Store the shape of the largest training batch, for the message when memory runs out."""
        self.in_training = model.training
        input_ids = batch.get("input_ids", arguments[0] if arguments else None)  # guidance hands them over by position
        shape = () if input_ids is None else tuple(input_ids.shape)
        if shape and self.in_training and math.prod(shape) > math.prod(self.largest_batch or (0,)):
            self.largest_batch = shape

    def _write(self, entries: dict[str, Any]) -> None:
        self._entries |= entries
        # the counts of a stream are known only at the end
        if entries and self._inputs is not None and self._inputs.datasets.stream_counts is not None:
            datasets = self._inputs.datasets
            datasets.ledger["train"] = stream.count_stream(self._inputs.datasets.stream_counts)
            self._write_ledger()
        text = json.dumps(self._entries, indent=2, ensure_ascii=False) + "\n"
        run_folder.write_text(self._run.output_dir / run_folder.RUN, text)
        run_folder.flush(self._run.output_dir)

    def _write_first_rows(self) -> None:
        """Write the first training rows of each source as the model sees them."""
        assert self._inputs is not None
        split, encoded = self._inputs.datasets.encoded["train"]
        tokenizer = self._inputs.chat.tokenizer
        rows = segmentation.select_first_rows(split, encoded, tokenizer, num_rows=_ROWS_SHOWN)
        lines = (json.dumps(row._asdict(), ensure_ascii=False) + "\n" for row in rows)
        run_folder.write_text(self._run.output_dir / run_folder.ROWS, "".join(lines))

    def _write_ledger(self) -> None:
        assert self._inputs is not None
        text = json.dumps(self._inputs.datasets.ledger, indent=2, ensure_ascii=False) + "\n"
        run_folder.write_text(self._run.output_dir / run_folder.LEDGER, text)
        rejects = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in self._inputs.datasets.rejects)
        run_folder.write_text(self._run.output_dir / run_folder.REJECTS, rejects)
