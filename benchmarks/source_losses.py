"""Measures what losses by source and task cost: quickstart steps with two sources, with these losses and without.

    python benchmarks/source_losses.py [PAIRS] [STEPS]

The rows of the quickstart are two sources, English and Chinese, whose rows have six tasks. One process on one thread
trains the same batches with and without in turn, step by step: rows from the dataset, collated, forward, backward,
optimizer. The order is reversed every time. The ratio of a pair is the median of STEPS steps; a log entry is measured
beside them. What is compared is processor time, which other programs on the machine change less than wall time. The
losses of all batches must be the same on both sides, bit by bit.
"""

import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]
SKILLS = ROOT / "trl_sft" / "embedded" / "skills"
SIDES = ("with", "without")


def write_sources(folder):
    """Write the rows of the quickstart as one file for each language; return the value of data.train."""
    lines = (SKILLS / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    for language in ("en", "zh"):
        chosen = [line for line in lines if json.loads(line)["language"] == language]
        (folder / f"{language}.jsonl").write_text("".join(chosen), encoding="utf-8")
    return f"[{{path: {folder}/en.jsonl, weight: 1}}, {{path: {folder}/zh.jsonl, weight: 1}}]"


class Side:
    """A trainer with losses by source, or one without; both have the same rows in the same order."""

    def __init__(self, folder, has_losses):
        from trl_sft import load_recipe
        from trl_sft.training import source_losses, stages
        from trl_sft.training.verify import Verification

        words = [f"data.train={write_sources(folder)}", "data.eval=null", "evaluate=false", "run.overwrite=null"]
        words += [f"train.output_dir={folder}/out", "train.eval_strategy=null"]
        run = load_recipe(ROOT / "recipes" / "quickstart.yaml", words)
        inputs = stages.prepare(run)
        self.trainer = stages.build_trainer(run, inputs)
        self.rows = inputs.datasets.train
        assert {"loss", "task_loss"} == set(inputs.datasets.groups.parts["train"].names)
        if has_losses:
            verification = Verification(run, inputs, self.trainer)
            source_losses.SourceLosses(self.trainer, inputs.datasets.groups, verification=verification, show=sys.exit)
        else:
            self.rows = self.rows.select_columns(["input_ids", "labels"])
        stages.replace_callbacks(self.trainer, [])
        self.trainer.create_optimizer()
        self.trainer.current_gradient_accumulation_steps = 1
        self.size = run.train["per_device_train_batch_size"]

    def train(self, step):
        """Train a step; return its loss."""
        trainer, start = self.trainer, step * self.size
        rows = self.rows[start : start + self.size]
        examples = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
        batch = trainer.data_collator(examples)
        number = (batch["labels"][:, 1:] != -100).sum()
        loss = float(trainer.training_step(trainer.model, batch, number))
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.state.global_step += 1
        return loss


def measure(function, *arguments):
    """Return the processor seconds of a call, and its result."""
    began = time.process_time()
    result = function(*arguments)
    return time.process_time() - began, result


def train_pair(sides, steps):
    """Train the same steps on both sides in turn, and log; return the seconds of steps and of the entry, by side."""
    seconds = {side: [] for side in SIDES}
    losses = {side: [] for side in SIDES}
    for step in steps:
        for side in SIDES[:: 1 if step % 2 == 0 else -1]:
            took, loss = measure(sides[side].train, step)
            seconds[side].append(took)
            losses[side].append(loss)
    if losses["with"] != losses["without"]:
        raise SystemExit(f"the losses differ: {losses}")
    entries = {side: measure(sides[side].trainer.log, {"loss": statistics.fmean(losses[side])})[0] for side in SIDES}
    return seconds, entries


def main(pairs, steps):
    """Print the processor time of a step and of a log entry on both sides, and the ratio of the steps."""
    with tempfile.TemporaryDirectory() as name:
        os.environ |= {"HF_HOME": name, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        sides = {side: Side(Path(name), side == "with") for side in SIDES}
        train_pair(sides, range(2))
        measured = [train_pair(sides, range(2 + n * steps, 2 + (n + 1) * steps)) for n in range(pairs)]
        logged = sides["with"].trainer.state.log_history
        if len(logged) != pairs + 1 or not all("task_loss/double" in entry for entry in logged):
            raise SystemExit(f"losses by source and task are not logged: {logged}")
    ratios = []
    for seconds, _ in measured:
        ratios.append(statistics.median(a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)))
    step, entry = (
        {side: 1000 * statistics.median(np.ravel([part[n][side] for part in measured])) for side in SIDES}
        for n in range(2)
    )
    print(f"{pairs * steps} steps with the same losses on both sides")
    print(f"processor time of a step: {step['with']:.2f} ms with, {step['without']:.2f} ms without")
    print(f"of a log entry: {entry['with']:.2f} ms with, {entry['without']:.2f} ms without")
    print(f"ratio of the steps {statistics.median(ratios):.4f} ({min(ratios):.4f} to {max(ratios):.4f})")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5, int(sys.argv[2]) if len(sys.argv) > 2 else 20)
