"""Runs in CPU processes that share the weights: FSDP2, ZeRO-2 and ZeRO-3 end with the model of DDP, and resume.

What lives on a process is compared with the estimate of `check`, also under DDP and ZeRO-1.

FSDP2 and DeepSpeed run by `sharded_run`, since accelerate gives them no CPU. DeepSpeed needs the extra
`deepspeed` and a compiler, which the dev group does not have.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from trl_sft import load_recipe
from trl_sft.recipe import paths
from trl_sft.training import stages
from trl_sft.training.memory import fit, sharding
from trl_sft.training.memory.estimate import estimate_step

pytestmark = pytest.mark.long
RECIPE = """\
model: {{name_or_path: {model}}}
data: {{train: rows.jsonl, eval_fraction: 0.2}}
train:
  {{output_dir: out, max_steps: 4, save_steps: 2, per_device_train_batch_size: 2, logging_steps: 1}}
evaluate: {{max_rows: 2, generation: {{max_new_tokens: 2}}}}
"""
_ZERO = ("train.use_cpu=false", "train.optim=adamw_torch", "train.bf16=false")
ENGINES = {
    "fsdp": ("launch.engine=fsdp", "train.use_cpu=true"),
    "zero2": ("launch.engine=zero2", *_ZERO),
    "zero3": ("launch.engine=zero3", *_ZERO),
}
without_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is missing")
EACH_ENGINE = pytest.mark.parametrize(
    "engine", ["fsdp", *(pytest.param(name, marks=without_deepspeed) for name in ("zero2", "zero3"))]
)
ONE_STEP = ("train.max_steps=1", "train.save_strategy=no", "evaluate=false")
STOPPED_AT_ONCE = "run.max_hours=1e-7"  # after the first step, with a checkpoint


@pytest.fixture
def train(here):
    """Return a function that trains with overrides in two processes, and returns their output."""
    Path("recipe.yaml").write_text(RECIPE.format(model=paths.EMBEDDED / "tiny"))

    def call(*overrides, processes=2, succeeds=True, **variables):
        script = Path(__file__).with_name("sharded_run.py")
        command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += ["--master_port=29547", str(script), "recipe.yaml", *overrides]
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"} | variables
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
        assert (done.returncode == 0) == succeeds, done.stderr[-3000:]
        return done.stdout + done.stderr

    return call


@torch.no_grad()
def compute_logits(folder):
    ids = torch.arange(20).reshape(2, 10)
    if (Path(folder) / "adapter_config.json").is_file():
        from peft import AutoPeftModelForCausalLM

        return AutoPeftModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits
    return AutoModelForCausalLM.from_pretrained(folder)(input_ids=ids).logits


def read_losses(folder):
    entries = map(json.loads, (Path(folder) / "log.jsonl").read_text().splitlines())
    return [entry["loss"] for entry in entries if "loss" in entry]


@EACH_ENGINE
@pytest.mark.parametrize("lora", ["null", "{r: 4, target_modules: all-linear}"], ids=["full", "lora"])
def test_sharded_run_ends_with_the_model_of_ddp_in_plain_transformers_and_peft(train, engine, lora):
    train("train.output_dir=ddp", "train.use_cpu=true", f"lora={lora}")
    train(*ENGINES[engine], f"lora={lora}")
    assert json.loads(Path("out/run.json").read_text())["outcome"] == "done"
    assert read_losses("out") == pytest.approx(read_losses("ddp"), rel=1e-5)
    logits, expected = compute_logits("out"), compute_logits("ddp")
    far = float((logits - expected).abs().max() / expected.abs().max())
    print(f"{engine}: logits differ from those of DDP by {far:.1e} at most")
    assert far < 1e-4
    weights = [path.name for path in Path("out").glob("*.safetensors")]
    assert weights == (["model.safetensors"] if lora == "null" else ["adapter_model.safetensors"])
    if lora != "null":  # the adapter alone, not the base
        assert (
            Path("out/adapter_model.safetensors").stat().st_size
            < Path("ddp/adapter_model.safetensors").stat().st_size * 1.1
        )


@EACH_ENGINE
def test_sharded_run_resumes_and_ends_equal_and_another_engine_is_refused_by_name(train, engine):
    train(*ENGINES[engine], "train.output_dir=whole")
    train(*ENGINES[engine], STOPPED_AT_ONCE, succeeds=False)
    assert [path.name for path in Path("out").glob("checkpoint-*")] == ["checkpoint-1"]
    shutil.copytree("out", "other")
    train(*ENGINES[engine])
    assert read_losses("out") == pytest.approx(read_losses("whole"), rel=1e-6)
    assert torch.allclose(compute_logits("out"), compute_logits("whole"), atol=1e-5)
    output = train(*ENGINES[engine][1:], "train.output_dir=other", succeeds=False)
    assert "cannot read its optimizer" in output
    assert "Set `launch.engine` to" in output
    if engine != "fsdp":
        output = train(*ENGINES[engine], "train.output_dir=other", processes=3, succeeds=False)
        assert "has the optimizer of 2 processes, and 3 train; DeepSpeed cannot divide it anew" in output


@pytest.mark.parametrize("lora", ["null", "{r: 4, target_modules: all-linear}"], ids=["full", "lora"])
def test_fsdp_resumes_with_four_processes_and_with_two_again_and_ends_equal(train, lora):
    words = (*ENGINES["fsdp"], f"lora={lora}", "run.global_batch_size=8", "evaluate=false")
    train(*words, "train.output_dir=whole")
    for processes, steps in ((2, 1), (4, 2)):
        train(*words, STOPPED_AT_ONCE, processes=processes, succeeds=False)
        assert Path(f"out/checkpoint-{steps}").is_dir()
    train(*words)
    assert read_losses("out") == pytest.approx(read_losses("whole"), rel=1e-5)
    assert torch.allclose(compute_logits("out"), compute_logits("whole"), atol=1e-5)


def read_save_trial(folder):
    return json.loads((Path(folder) / "run.json").read_text())["measured"]["save_trial"]


@EACH_ENGINE
def test_run_in_bfloat16_gathers_and_compares_a_part_of_the_weights_where_a_checkpoint_is_large(train, engine):
    words = [word for word in ENGINES[engine] if "bf16" not in word]
    train(*words, "train.bf16=true", *ONE_STEP, WHOLE_BYTES="0")
    trial = read_save_trial("out")
    assert not trial["is_whole"]
    assert trial["compared"] == trial["model"]  # all weights of a small model are such a part
    assert not list(Path("out").glob("_*"))


def test_engine_that_would_save_only_its_shards_is_refused_before_step_1(train):
    """ZeRO-3 cannot come so far: the recipe refuses the key that would make it save shards."""
    words = (*ENGINES["fsdp"], "launch.config={state_dict_type: SHARDED_STATE_DICT}")
    output = train(*words, *ONE_STEP, succeeds=False)
    assert "saves no weights that transformers can load" in output
    assert "Remove `state_dict_type`" in output
    assert not list(Path("out").glob("*"))


_BUCKET = 6_000_000  # elements: more than the embedding has, less than a third of the model
_DEEPSPEED = (
    "launch.config={{bf16: {{enabled: auto}}, fp16: {{enabled: auto}}, train_micro_batch_size_per_gpu: auto, "
    "train_batch_size: auto, gradient_accumulation_steps: auto, gradient_clipping: auto, "
    "zero_optimization: {{stage: {stage}, reduce_bucket_size: {bucket}}}}}"
)
# name -> engine, precision, elements of the bucket (None: the engine has none to set), batches of a step
MEASURED = {
    "ddp": ("ddp", "float32", None, 1),
    "fsdp": ("fsdp", "float32", None, 1),
    "fsdp in bfloat16": ("fsdp", "bfloat16", None, 1),
    "zero1": ("zero1", "float32", 500_000_000, 1),
    "zero2": ("zero2", "float32", _BUCKET, 1),
    "zero2 in bfloat16": ("zero2", "bfloat16", _BUCKET, 2),
    "zero3": ("zero3", "float32", _BUCKET, 1),
    "zero3 in bfloat16": ("zero3", "bfloat16", 500_000_000, 1),
}
_CLOSE = 0.01  # relative: padding of the shares, and tensors of a few values
_BUCKET_IS_FULL = 0.1  # a bucket is scattered when the next gradient does not fit


@pytest.fixture(scope="module")
def model_of_22_million(tmp_path_factory):
    """Return the folder of a model that is large enough for the parts to show beside what else lives."""
    folder = tmp_path_factory.mktemp("model")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
    LlamaForCausalLM(LlamaConfig(vocab_size=8000, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny").save_pretrained(folder)
    return folder


def estimate_memory(words):
    """Return the estimate of one of two processes, and what ZeRO takes beside the shares."""
    run = load_recipe("recipe.yaml", words)
    settings, model, configured, rows = stages.read_rows(run)
    tokenized = stages.tokenize(run, configured, rows, settings=settings)
    inputs = stages.TrainingInputs(settings, model, configured, rows, tokenized)
    batch = fit.find_largest_batch(tokenized.train, inputs.args)
    whole = estimate_step(run, inputs, batch, device_type="cpu")
    own = sharding.divide(whole, run, inputs.args, config=model.config, batch=batch, processes=2)
    return own, sharding.count_zero_buffers(whole, run, inputs.args, config=model.config, shards=2)


@pytest.mark.parametrize("name", [pytest.param(n, marks=without_deepspeed if "zero" in n else ()) for n in MEASURED])
def test_memory_that_lives_on_a_process_is_the_estimated_one(train, model_of_22_million, name):
    engine, precision, bucket, batches = MEASURED[name]
    words = [f"model.name_or_path={model_of_22_million}", f"launch.engine={engine}", "train.max_steps=2"]
    words += ["train.save_strategy=no", "evaluate=false", f"train.bf16={str(precision == 'bfloat16').lower()}"]
    words += [f"train.gradient_accumulation_steps={batches}", "train.optim=adamw_torch"]
    words += [_DEEPSPEED.format(stage=engine[-1], bucket=bucket)] if bucket else []
    train(*words, f"train.use_cpu={str(not bucket).lower()}", MEMORY_FILE="memory.jsonl")
    own, beside = estimate_memory([*words, "train.use_cpu=true"])
    for line in Path("memory.jsonl").read_text().splitlines():
        measured = json.loads(line)
        print(name, measured, own, beside)
        assert measured["weights"] == pytest.approx(own.weights, rel=_CLOSE)
        assert measured["optimizer"] == pytest.approx(own.optimizer, rel=_CLOSE)
        if not bucket:
            assert measured["gradients"] == pytest.approx(own.gradients, rel=_CLOSE)
            assert measured["others"] < own.weights * _CLOSE
            continue
        flat = own.optimizer / 12 * 2 if precision == "bfloat16" else 0  # it is gone when the optimizer steps
        at_update = own.gradients + beside.update - flat
        assert measured["gradients"] + measured["others"] == pytest.approx(at_update, rel=_CLOSE)
        in_pass = measured["backward"]["gradients"] + measured["backward"]["others"]
        close = _BUCKET_IS_FULL if engine == "zero3" else _CLOSE
        assert in_pass == pytest.approx(own.gradients + beside.backward, rel=close)
        if engine == "zero3":
            assert measured["backward"]["gathered"] == pytest.approx(own.buffers - beside.backward, rel=_CLOSE)
