"""Train short real runs of the embedded model, and record their logs for the tests of findings and verdicts.

python scripts/record_runs.py [NAME ...]      (some 20 seconds a run on two idle cores; all without names)

Writes tests/training/recorded_runs/NAME.json: facts of the run, its log, its answers, its findings and its verdict.
`healthy-*` are runs in which nothing is wrong; each other one has one fault, on purpose. Thresholds of
`trl_sft/training/diagnosis` were fixed before these runs; whoever changes one does not tune it on them.
"""

import dataclasses
import json
import random
import sys
import tempfile
from pathlib import Path
from typing import Any

import trl_sft
from trl_sft.errors import RunStopped
from trl_sft.training import monitor

ROOT = Path(__file__).parents[1]
SKILLS = ROOT / "trl_sft" / "embedded" / "skills"
RECORDS = ROOT / "tests" / "training" / "recorded_runs"
Rows = list[dict[str, Any]]
RECIPE = """\
model: {name_or_path: trl_sft:tiny}
data: {train: train.jsonl, eval: eval.jsonl, drop_leaked: false}
train:
  output_dir: out
  per_device_train_batch_size: 16
  per_device_eval_batch_size: 60
  max_steps: 120
  logging_steps: 2
  eval_strategy: steps
  eval_steps: 20
  save_strategy: 'no'
  gradient_checkpointing: false
evaluate: {max_rows: 40}
run: {allow: [unused_columns]}
"""
LORA = "lora={r: 16, lora_alpha: 32, target_modules: all-linear}"
RATE = "train.learning_rate="


def read_rows(part: str) -> Rows:
    """Return the rows of a split of `skills`, `train` or `test`, in an order of their own."""
    rows = [json.loads(line) for line in (SKILLS / f"{part}.jsonl").read_text("utf-8").splitlines()]
    random.Random(5).shuffle(rows)
    return [
        {"question": row["question"], "answer": row["answer"], **{k: row[k] for k in ("language", "task")}}
        for row in rows
    ]


def answer_at_random(rows: Rows, length: int) -> Rows:
    """Return rows whose answers are random letters, so that nothing but the rows themselves can be learned."""
    draw = random.Random(len(rows))  # training rows and held-out rows differ in number, so also in their answers
    return [row | {"answer": "".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=length))} for row in rows]


TRAIN, TEST = read_rows("train"), read_rows("test")
EASY = ("upper", "last")
RUNS: dict[str, tuple[Rows, Rows, tuple[str, ...]]] = {
    "healthy-full": (TRAIN[:2000], TEST[:60], (RATE + "1e-3",)),
    "healthy-warmup-cosine": (
        TRAIN[:2500],
        TEST[60:120],
        (RATE + "2e-3", "train.warmup_steps=12", "train.lr_scheduler_type=cosine", "train.seed=1"),
    ),
    "healthy-lower-rate": (TRAIN[500:], TEST[:60], (RATE + "3e-4", "train.seed=2", "train.logging_steps=4")),
    "healthy-lora": (TRAIN[:2000], TEST[:60], (RATE + "5e-3", LORA, "train.seed=3")),
    "healthy-lora-lower-rate": (TRAIN[1000:], TEST[60:120], (RATE + "2e-3", LORA, "train.seed=4")),
    "healthy-small-batch": (
        TRAIN[:1500],
        TEST[:60],
        (RATE + "5e-4", "train.per_device_train_batch_size=4", "train.logging_steps=1", "train.seed=5"),
    ),
    "healthy-packing": (
        TRAIN[:2000],
        TEST[:60],
        (RATE + "1e-3", "train.packing=true", "train.max_length=256", "train.per_device_train_batch_size=2"),
    ),
    "healthy-loss-on-all": (TRAIN[:2000], TEST[:60], (RATE + "1e-3", "data.loss_on=all", "train.seed=6")),
    "healthy-chinese": (
        [row for row in TRAIN if row["language"] == "zh"],
        [row for row in TEST if row["language"] == "zh"][:60],
        (RATE + "1e-3", "train.seed=7"),
    ),
    "healthy-easy-tasks": (
        [row for row in TRAIN if row["task"] in EASY],
        [row for row in TEST if row["task"] in EASY][:60],
        (RATE + "1e-3", "train.lr_scheduler_type=constant", "train.seed=8"),
    ),
    "healthy-accumulation": (
        TRAIN[:2000],
        TEST[:60],
        (RATE + "1e-3", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=4", "train.seed=9"),
    ),
    "healthy-adafactor": (TRAIN[:2000], TEST[:60], (RATE + "1e-3", "train.optim=adafactor", "train.seed=10")),
    # the three runs of issue 17, and those that its findings need
    "thirty-rows-thirty-epochs": (
        TRAIN[:30],
        TEST[:40],
        (
            *(RATE + "1e-3", "train.max_steps=null", "train.num_train_epochs=30", "train.logging_steps=1"),
            *("train.per_device_train_batch_size=8", "train.eval_steps=5"),
        ),
    ),
    "rate-too-low": (TRAIN[:400], TEST[:40], (RATE + "1e-6", "train.max_steps=100")),
    "rate-too-high": (TRAIN[:400], TEST[:40], (RATE + "0.3", "train.max_steps=100")),
    # nothing may be generated, so that these rows are known by heart too is not tried
    "overfitting": (
        TRAIN[:120],
        TEST[:60],
        (RATE + "2e-3", "train.max_steps=48", "train.eval_steps=6", "train.eval_on_start=true", "evaluate=false"),
    ),
    "memorisation": (
        answer_at_random(TRAIN[:32], 12),
        answer_at_random(TEST[:40], 12),
        (RATE + "2e-3", "train.eval_steps=20"),
    ),
    "nothing-to-learn": (
        answer_at_random(TRAIN[:2000], 1),
        answer_at_random(TEST[:60], 1),
        (RATE + "1e-6", "train.max_steps=100"),
    ),
    "not-finite": (TRAIN[:400], TEST[:40], (RATE + "1e4", "train.max_grad_norm=0")),
}
_COLUMNS = ("loss", "grad_norm", "learning_rate", "entropy", "mean_token_accuracy", "epoch", "train_loss")


def record(name: str) -> dict[str, Any]:
    """Train a run in a folder of its own and return what the tests need of it."""
    train, held_out, overrides = RUNS[name]
    facts: dict[str, Any] = {}
    read_facts = monitor.read_facts

    def keep_facts(*args: Any, **keywords: Any) -> Any:
        result = read_facts(*args, **keywords)
        facts.update(dataclasses.asdict(result))
        return result

    monitor.read_facts = keep_facts
    with tempfile.TemporaryDirectory() as folder:
        for part, rows in (("train", train), ("eval", held_out)):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            Path(folder, f"{part}.jsonl").write_text(text, encoding="utf-8")
        recipe = Path(folder, "recipe.yaml")
        recipe.write_text(RECIPE, encoding="utf-8")
        out = Path(folder, "out")
        stopped = ""
        try:
            trl_sft.train(trl_sft.load_recipe(recipe, [*overrides, f"train.output_dir={out}"]))
        except RunStopped as error:
            stopped = str(error).splitlines()[0].replace(str(out), "out")
        finally:
            monitor.read_facts = read_facts
        log = [json.loads(line) for line in (out / "log.jsonl").read_text("utf-8").splitlines()]
        samples = []
        if (out / "samples.jsonl").is_file() and not stopped:
            samples = [json.loads(line) for line in (out / "samples.jsonl").read_text("utf-8").splitlines()]
        summary = json.loads((out / "run.json").read_text("utf-8"))
    return {
        "overrides": list(overrides),
        "facts": facts,
        "log": [_shorten(entry) for entry in log],
        "samples": [{key: sample[key] for key in ("reference", "before", "after", "stopped")} for sample in samples],
        "findings": [finding["code"] for finding in summary["findings"]],
        "verdict": summary.get("verdict", {}).get("code"),
        "completions": next((f["numbers"] for f in summary["findings"] if f["code"] == "memorisation"), None),
        "stopped": stopped,
    }


def _shorten(entry: dict[str, Any]) -> dict[str, Any]:
    """Return a log entry without times, with five digits."""
    kept = {key: value for key, value in entry.items() if key in _COLUMNS or key == "step"}
    kept |= {key: value for key, value in entry.items() if key in ("eval_loss", "eval_mean_token_accuracy")}
    return {key: float(f"{value:.5g}") if isinstance(value, float) else value for key, value in kept.items()}


def main(names: list[str]) -> None:
    """Record runs."""
    RECORDS.mkdir(exist_ok=True)
    for name in names or list(RUNS):
        result = record(name)
        head = {key: result[key] for key in result if key not in ("log", "samples")}
        lines = [f'"{key}": {json.dumps(value, ensure_ascii=False)},' for key, value in head.items()]
        for key in ("samples", "log"):
            items = ",\n".join(json.dumps(item, ensure_ascii=False) for item in result[key])
            lines.append(f'"{key}": [\n{items}\n]' + ("," if key == "samples" else ""))
        (RECORDS / f"{name}.json").write_text("{\n" + "\n".join(lines) + "\n}\n", encoding="utf-8")
        print(f"## {name}: findings {result['findings']}, verdict {result['verdict']} {result['stopped']}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
