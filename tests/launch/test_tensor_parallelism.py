"""Tensor parallelism in two CPU processes: `model.distributed_config` divides layers, and the run ends as one process.

accelerate 1.15 divides layers among cards alone, so `tensor_parallel_run` lets it take two CPU processes for this test.
transformers' division of the weights, and torch's DTensor, work with gloo. Context parallelism needs torch's flash
kernels and was not run on CPUs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from trl_sft.recipe import paths

pytestmark = pytest.mark.long
RECIPE = """\
model: {{name_or_path: {model}{division}}}
data: {{train: rows.jsonl}}
train:
  output_dir: {out}
  max_steps: 3
  save_strategy: "no"
  per_device_train_batch_size: 2
  logging_steps: 1
  use_cpu: true
evaluate: false
"""


def run(out, division, *command):
    Path("recipe.yaml").write_text(RECIPE.format(model=paths.EMBEDDED / "tiny", division=division, out=out))
    arguments = [sys.executable, *command, "recipe.yaml"]
    done = subprocess.run(
        arguments, check=False, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    entries = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return json.loads((Path(out) / "run.json").read_text()), [entry["loss"] for entry in entries if "loss" in entry]


@torch.no_grad()
def test_layers_divided_among_two_processes_end_as_one_process(here):
    script = str(Path(__file__).with_name("tensor_parallel_run.py"))
    launch = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=29553", script)
    record, losses = run("two", ", distributed_config: {tp_size: 2}", *launch)
    expected_record, expected = run("one", "", "-m", "trl_sft")
    assert losses == pytest.approx(expected, rel=1e-5)
    before = record["measured"]["before_training"]
    assert (before["engine"], before["tensor_parallel_size"]) == ("tensor parallelism", 2)
    assert before["parameter_share"] == pytest.approx(0.5, abs=0.01)
    after, expected_after = (entry["measured"]["after_training"] for entry in (record, expected_record))
    assert [after[name] for name in ("rows", "tokens")] == [expected_after[name] for name in ("rows", "tokens")]
    ids = torch.arange(20).reshape(2, 10)
    logits, reference = (AutoModelForCausalLM.from_pretrained(name)(input_ids=ids).logits for name in ("two", "one"))
    assert float((logits - reference).abs().max() / reference.abs().max()) < 1e-4
