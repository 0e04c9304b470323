"""The memory of a step, estimated on fake tensors, against the live tensors of real runs; and the lines about it."""

import dataclasses
import gc
import importlib.metadata
import json
import re
import shlex
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import QUESTIONS, RECIPE, jsonl
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaModel

from trl_sft import cli, load_recipe, upstream_warnings
from trl_sft.model import patches
from trl_sft.recipe import paths
from trl_sft.training import failures, stages
from trl_sft.training.memory import estimate, fit
from trl_sft.training.memory.fake_model import Batch
from trl_sft.training.stages import build_trainer

GIB = 2**30
FULL, LORA = "", "lora: {r: 8, target_modules: all-linear}\n"
EIGHT = "quantization: {load_in_8bit: true}\n" + LORA
FOUR = "quantization: {load_in_4bit: true, bnb_4bit_quant_type: nf4, bnb_4bit_use_double_quant: true}\n" + LORA
TEXT = """\
model: {{name_or_path: ./m}}
data: {{train: long.jsonl}}
{section}train:
  output_dir: out
  max_steps: 2
  per_device_train_batch_size: 4
  save_strategy: 'no'
  report_to: none
evaluate: false
"""
# shapes of several architectures; none of them was used to make anything fit, as nothing is fitted
SHAPES = {
    "llama": {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 3},
    "qwen2": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 8, "tie_word_embeddings": True},
    "gemma2": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "head_dim": 32},
    "gemma": {"hidden_size": 64, "intermediate_size": 320, "num_hidden_layers": 2, "head_dim": 32},
    "gpt2": {"n_embd": 128, "n_layer": 7, "n_head": 4, "n_positions": 1024},
    "gpt_neox": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "max_position_embeddings": 1024},
}


@pytest.fixture(autouse=True)
def quietly():
    """As in a command: upstream's warnings are no errors."""
    with upstream_warnings.quiet():
        yield


def write(folder, kind):
    """Write a model of a kind with the toy's tokenizer, and rows of several lengths."""
    shutil.copytree(paths.EMBEDDED / "tiny", folder / "m")
    vocabulary = json.loads((folder / "m" / "config.json").read_text())["vocab_size"]
    (folder / "m" / "model.safetensors").unlink()
    text = {"vocab_size": vocabulary, "num_attention_heads": 4, "pad_token_id": 0, "eos_token_id": 1}
    text |= {} if kind.startswith("gpt") else {"num_key_value_heads": 2}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **text | SHAPES[kind])).save_pretrained(folder / "m")
    rows = [{"question": f"{n} " * (4 + 3 * n), "answer": "yes " * (5 + 3 * n)} for n in range(1, 25)]
    jsonl(folder / "long.jsonl", rows)


def prepare(folder, section, *words):
    (folder / "recipe.yaml").write_text(TEXT.format(section=section))
    run = load_recipe("recipe.yaml", list(words))
    return run, stages.prepare(run)


def storages(tensors):
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def collect_storages(model):
    """Return the storages of weights, buffers, and what quantization keeps beside them."""
    tensors = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
        if type(module).__name__ == "Linear8bitLt" and hasattr(module, "state"):
            tensors += [
                t for t in (module.state.CB, module.state.SCB, module.weight.CB, module.weight.SCB) if t is not None
            ]
    return storages([t for t in tensors if t is not None])


def shape(trainer, inputs):
    """Return the shape of a batch of TRL's collator."""
    rows, tokens = inputs["input_ids"].shape
    labelled = int((inputs["labels"][:, 1:] != -100).sum())
    mask = inputs.get("attention_mask")
    documents = ()
    if trainer.padding_free:  # TRL 1.8 writes positions and no borders of documents
        starts = (inputs["position_ids"][0] == 0).nonzero().flatten()
        documents = tuple(torch.cat([starts, torch.tensor([tokens])]).diff().tolist())
        if "cu_seq_lens_q" in inputs:
            assert documents == tuple(inputs["cu_seq_lens_q"].diff().tolist())
    padded = mask is not None and not bool(mask.all())
    return Batch(rows, tokens, labelled, trainer.padding_free, padded, documents)


def measure_run(run, inputs):
    """Train two steps; return bytes of weights, gradients, optimizer, and of what the largest batch stores.

    That is what autograd saves, and what Python holds beside it: masks and positions of layers that run again,
    and what bitsandbytes keeps on its contexts, are unseen by autograd's hooks.
    """
    trainer = build_trainer(run, inputs)
    seen, known = {"saved": 0}, {}
    compute, create = trainer.compute_loss, trainer.create_optimizer

    def watched(model, inputs, *args, **kwargs):
        stored = []
        earlier = gc.get_objects()  # they stay alive, so that no tensor of this step gets the identity of one of them
        with torch.autograd.graph.saved_tensors_hooks(lambda t: stored.append(t) or t, lambda t: t):
            out = compute(model, inputs, *args, **kwargs)
        known.update(collect_storages(trainer.model))
        gc.collect()
        identities = set(map(id, earlier))
        stored += [t for t in gc.get_objects() if isinstance(t, torch.Tensor) and id(t) not in identities]
        del earlier
        saved = sum(n for p, n in storages(stored).items() if p not in known)
        if saved > seen["saved"]:
            seen.update(saved=saved, batch=shape(trainer, inputs))
        return out

    def watching(*args, **kwargs):
        optimizer = create(*args, **kwargs)

        def count(*_):
            grads = [p.grad for p in trainer.model.parameters() if p.grad is not None]
            seen["gradients"] = sum(storages(grads).values())

        optimizer.register_step_pre_hook(count)
        return optimizer

    trainer.compute_loss, trainer.create_optimizer = watched, watching
    trainer.train()
    seen["weights"] = sum(collect_storages(trainer.model).values())
    state = [v for values in trainer.optimizer.state.values() for v in values.values() if isinstance(v, torch.Tensor)]
    seen["optimizer"] = sum(storages(state).values())
    return seen


def compare_with_run(folder, kind, section, *words):
    """Hold an estimate against a run of its largest batch: 2% for what is certain, 15% for the rest."""
    write(folder, kind)
    run, inputs = prepare(folder, section, "run.logits_gib=3e-4", *words)  # so little that the loss keeps no logits
    seen = measure_run(run, inputs)
    step = estimate.estimate_step(run, inputs, seen["batch"], device_type="cpu")
    for part in ("weights", "gradients", "optimizer"):
        near(getattr(step, part), seen[part], 0.02)
    near(step.activations, seen["saved"], 0.15)
    assert step.peak >= step.minimum
    assert not step.missing


def near(value, expected, share):
    assert abs(value - expected) <= share * expected, f"{value:,} against {expected:,}"


PLAIN, AGAIN = "train.gradient_checkpointing=false", "train.gradient_checkpointing=true"
PACKED = ("train.packing=true", "train.max_length=384")
BF16 = ("train.bf16=true", "train.use_cpu=true")
HAS_CPU_OPTIMIZERS = Version(importlib.metadata.version("bitsandbytes")) >= Version("0.50")
SMALL_OPTIMIZER = "adamw_8bit" if HAS_CPU_OPTIMIZERS else "adafactor"
FEW = [
    ("llama", FULL, PLAIN, "train.optim=adafactor"),
    ("llama", LORA, AGAIN, *PACKED, *BF16),
    ("llama", EIGHT, PLAIN),
    ("llama", FOUR, AGAIN, *BF16),
    ("gpt2", FULL, PLAIN, *PACKED, f"train.optim={SMALL_OPTIMIZER}"),
]
OPTIMIZERS = ["sgd", "adamw_torch", "adagrad", "rmsprop"]
if HAS_CPU_OPTIMIZERS:
    OPTIMIZERS += ["paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"]
ALL = [
    *((kind, FULL, way, *packed) for kind in SHAPES for way in (PLAIN, AGAIN) for packed in ((), PACKED)),
    *(
        ("gpt_neox", section, way, *more)
        for section in (LORA, EIGHT, FOUR)
        for way in (PLAIN, AGAIN)
        for more in ((), BF16)
    ),
    *(("qwen2", FULL, AGAIN, f"train.optim={name}") for name in OPTIMIZERS),
    ("llama", FULL, PLAIN, *BF16, "model.dtype=bfloat16"),
    ("llama", FULL, AGAIN, *BF16),
]


@pytest.mark.parametrize("cell", FEW, ids=" ".join)
def test_estimate_is_that_of_the_live_tensors(cell, here):
    compare_with_run(here, *cell)


@pytest.mark.long
@pytest.mark.parametrize("cell", ALL, ids=" ".join)
def test_estimate_is_that_of_the_live_tensors_everywhere(cell, here):
    compare_with_run(here, *cell)


@pytest.mark.parametrize("words", [(PLAIN,), (AGAIN, "train.gradient_accumulation_steps=2")])
def test_estimate_from_few_layers_is_that_of_all(words, here, monkeypatch):
    write(here, "qwen2")
    run, inputs = prepare(here, FULL, *words)
    few = estimate.estimate_step(run, inputs, Batch(4, 96, 100), device_type="cpu")
    monkeypatch.setattr(estimate, "_FEW_ROUNDS", 99)
    assert estimate.estimate_step(run, inputs, Batch(4, 96, 100), device_type="cpu") == few


def test_pattern_of_layers_is_taken_whole():
    text = {"num_hidden_layers": 24, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"] * 8}
    assert estimate._find_pattern(AutoConfig.for_model("gemma3_text", **text)) == 3
    assert estimate._find_pattern(AutoConfig.for_model("llama")) == 1


@pytest.mark.skipif(not patches.expects_fused_head(), reason="this TRL is older than its fused head")
def test_logits_that_the_loss_keeps_are_counted(here):
    write(here, "llama")
    batch = Batch(4, 96, 300)
    without, with_logits = (
        estimate.estimate_step(*prepare(here, FULL, f"run.logits_gib={g}"), batch, device_type="cpu")
        for g in ("3e-4", "1")
    )
    assert with_logits.activations - without.activations == 300 * 512 * 4


def test_gpu_is_estimated_without_one(here):
    """Attention without a mask keeps what grows with the tokens; a mask of padding grows with their square."""
    write(here, "llama")
    run, inputs = prepare(here, FULL, PLAIN, *BF16)
    sizes = {
        (tokens, padded): estimate.estimate_step(run, inputs, Batch(2, tokens, 64, padded=padded), device_type="cuda")
        for tokens in (1024, 2048)
        for padded in (False, True)
    }
    grown = [sizes[2048, padded].activations / sizes[1024, padded].activations for padded in (False, True)]
    assert 1.9 < grown[0] < 2.05
    assert 2.3 < grown[1] < 4
    layers, rows, bias = 3, 2, 2048 * 2048 * 2  # each layer turns the mask into numbers of two bytes
    assert sizes[2048, True].activations - sizes[2048, False].activations >= layers * rows * bias


@pytest.mark.long
def test_eight_billion_weights_are_counted_without_holding_them(here):
    write(here, "llama")
    text = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "vocab_size": 128256, "architectures": ["LlamaForCausalLM"]}
    run, inputs = prepare(here, FOUR, *BF16, "model.dtype=bfloat16")
    config = AutoConfig.for_model("llama", **text)
    inputs = dataclasses.replace(inputs, model=inputs.model._replace(config=config))
    step = estimate.estimate_step(run, inputs, Batch(1, 512, 512), device_type="cuda")
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    ends = 2 * 128256 * 4096 * 2
    near(step.weights, linear * (0.5 + 1 / 64) + ends, 0.02)
    assert step.weights < step.peak < 10 * GIB


def test_experts_that_cannot_be_estimated_leave_weights_gradients_and_optimizer(here, monkeypatch):
    write(here, "llama")
    run, inputs = prepare(here, FULL)

    def asks(*_, **__):
        raise RuntimeError("which expert?\nnobody knows")

    monkeypatch.setattr(estimate, "_measure_pass", asks)
    step = estimate.estimate_step(run, inputs, Batch(1, 64, 64), device_type="cpu")
    assert step.missing == "RuntimeError: which expert?"
    assert step.peak >= step.minimum > 0
    assert "activations cannot be estimated (RuntimeError: which expert?)" in fit.describe_estimate(step, GIB)[0][1]


def test_nothing_of_an_estimate_stays_behind(here, go):
    """4-bit weights with double quantization: bitsandbytes keeps tables as long as the process lives."""
    words = (f"train.optim={SMALL_OPTIMIZER}", "train.max_steps=2")
    recipe = FOUR + RECIPE
    assert go(recipe, *words, "train.output_dir=a")[0] == 0
    assert go(recipe, *words, "train.output_dir=b", command=["check"])[0] == 0
    assert go(recipe, *words, "train.output_dir=b")[0] == 0
    one, other = (load_file(here / name / "adapter_model.safetensors") for name in "ab")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any(type(o).__name__ == "FakeTensorMode" for o in gc.get_objects())


def test_largest_batch_is_that_of_the_longest_rows(here):
    write(here, "llama")
    _, inputs = prepare(here, FULL, "train.per_device_train_batch_size=2", "train.shuffle_dataset=true")
    batch = fit.find_largest_batch(inputs.datasets.train, inputs.args)
    rows = sorted(inputs.datasets.train, key=lambda row: -len(row["input_ids"]))[:2]
    labelled = sum(label != -100 for row in rows for label in row["labels"])
    assert batch == Batch(2, len(rows[0]["input_ids"]), labelled, padded=True)
    _, inputs = prepare(here, FULL, *PACKED, "train.per_device_train_batch_size=2")
    batch = fit.find_largest_batch(inputs.datasets.train, inputs.args)
    assert batch.flat
    assert batch.tokens <= 384
    assert max(batch.documents) <= batch.tokens
    assert sum(batch.documents) <= 2 * batch.tokens
    inputs.args.pad_to_multiple_of = 1000
    assert fit.find_largest_batch(inputs.datasets.train, inputs.args).tokens == 1000


def test_free_memory_is_that_of_the_container(tmp_path, monkeypatch):
    free = fit.get_free_bytes("cpu")
    assert free > 0
    names = [tmp_path / name for name in ("max", "current", "stat")]
    for path, text in zip(names, ("3000\n", "1500\n", "anon 1\ninactive_file 400\n"), strict=True):
        path.write_text(text)
    monkeypatch.setattr(fit, "_CGROUP_FILES", tuple(map(str, names)))
    assert fit.get_free_bytes("cpu") == 1900
    names[0].write_text("max\n")
    assert fit.get_free_bytes("cpu") > 1900


def test_check_shows_memory_and_disk_and_writes_nothing(here, go):
    code, out, _ = go(RECIPE, command=["check"])
    assert code == 0
    assert re.search(r"^memory +about [\d.]+ MiB at most in a step of 2 x \d+ tokens, of .* free: weights", out, re.M)
    assert re.search(r"^disk +no checkpoints, .* for the model at the end; .* free$", out, re.M)
    assert not (here / "out").exists()


def test_machine_that_cannot_hold_the_weights_is_refused_and_too_few_bytes_for_the_rest_give_a_warning(go, monkeypatch):
    monkeypatch.setattr(fit, "get_free_bytes", lambda _: 1000)
    code, _, err = go(RECIPE, command=["check"])
    assert code == 2
    assert "weights, gradients and optimizer state alone take" in err
    assert "lora: {r: 16, target_modules: all-linear}" in err
    step = fit.Estimate(100, 100, 200, 5000, 10, 5300)
    assert len(fit.describe_estimate(step, 10_000)) == 1
    assert "NOT ENOUGH" in fit.describe_estimate(step, 5000)[1][1]
    assert "gradient_checkpointing" in fit.describe_estimate(step, 5500)[1][1]


def test_disk_counts_checkpoints_as_they_are_written(here, go, monkeypatch):
    write(here, "llama")
    words = ("train.save_strategy=steps", "train.save_steps=1", "train.save_total_limit=1")
    run, inputs = prepare(here, FULL, *words)
    step = estimate.estimate_step(run, inputs, Batch(1, 64, 64), device_type="cpu")
    assert go(None, *words)[0] == 0
    names = ("model.safetensors", "optimizer.pt")
    saved = fit.get_saved_bytes(run, inputs, step)
    near(saved.model, (here / "out" / names[0]).stat().st_size, 0.02)
    near(saved.checkpoint, sum((here / "out" / "checkpoint-2" / name).stat().st_size for name in names), 0.02)
    monkeypatch.setattr(fit.shutil, "disk_usage", lambda _: SimpleNamespace(free=2 * saved.checkpoint))
    text = fit.describe_disk(inputs.args, run.output_dir, saved=saved, checkpoints=1)
    assert "at most 1 checkpoint of" in text
    assert "NOT ENOUGH" in text


def test_probe_measures_two_steps_and_writes_nothing(here, go):
    write(here, "llama")
    text = TEXT.format(section=FULL)
    code, out, err = go(text, PLAIN, "--probe", command=["check"])
    assert code == 0, err
    match = re.search(r"^probe +([\d.]+) (\w+) at most in 2 steps of 4 x .*estimated: ([\d.]+) (\w+)", out, re.M)
    units = {"KiB": 2**10, "MiB": 2**20, "GiB": GIB}
    measured, estimated = (float(match[i]) * units[match[i + 1]] for i in (1, 3))
    assert 0.2 < estimated / measured < 1.3  # what the allocator keeps counts on one side alone
    assert not (here / "out").exists()


def test_probe_trains_rows_whose_loss_is_logged_by_task(here, go):
    """Such rows carry numbers beside their tokens."""
    jsonl(here / "rows.jsonl", [row | {"task": f"t{n % 2}"} for n, row in enumerate(QUESTIONS)])
    code, out, err = go(RECIPE, "--probe", command=["check"])
    assert code == 0, err
    assert re.search(r"^probe +[\d.]+ \w+ at most in 2 steps of 2 x ", out, re.M)


def test_probe_that_memory_does_not_hold_returns_4(go, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    monkeypatch.setattr(LlamaModel, "forward", full)
    monkeypatch.setattr(fit, "estimate_step", lambda *_, **__: fit.Estimate(1, 1, 1, 1, 1, 5))
    code, _, err = go(RECIPE, "--probe", command=["check"])
    assert code == 4
    assert "train.per_device_train_batch_size: 1, train.gradient_accumulation_steps: 2" in err


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
    ids=["cuda", "python", "cpu"],
)
def test_memory_that_is_out_says_the_batch_and_a_command_that_goes_on(error, here, go, monkeypatch):
    calls = []
    forward = LlamaModel.forward

    def full(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", full)
    words = ("train.save_strategy=steps", "train.save_steps=1", "train.gradient_checkpointing=false")
    code, _, err = go(RECIPE, *words)
    assert code == 4
    assert "Traceback" not in err
    assert "out of memory at step 1; the last checkpoint is" in err
    assert re.search(r"The largest training batch so far: 2 x \d+ tokens", err)
    settings = "train.per_device_train_batch_size: 1 (now 2), train.gradient_accumulation_steps: 2 (now 1)"
    assert settings in err
    assert json.loads((here / "out" / "run.json").read_text())["outcome"].startswith("out of memory")
    command = shlex.split(err.split("To resume with them: ")[1].splitlines()[0])
    assert cli.main(command[command.index("trl_sft") + 1 :]) == 0
    assert (here / "out" / "model.safetensors").exists()


def test_advice_follows_what_is_left_to_write():
    args = SimpleNamespace(per_device_train_batch_size=6, gradient_accumulation_steps=2)
    assert failures.suggest_less_memory(args) == {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 4}
    args.per_device_train_batch_size, args.gradient_checkpointing, args.max_length = 1, False, 1024
    assert failures.suggest_less_memory(args) == {"gradient_checkpointing": True}
    args.gradient_checkpointing = True
    assert failures.suggest_less_memory(args) == {"max_length": 512}


def test_memory_that_is_out_in_the_evaluation_says_so(here, go, monkeypatch):
    forward = LlamaModel.forward

    def full(self, *args, **kwargs):
        if not self.training:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", full)
    words = ("data.eval_fraction=0.2", "train.eval_strategy=steps", "train.eval_steps=1", "train.eval_on_start=false")
    code, _, err = go(RECIPE, *words, "evaluate=false", "train.per_device_eval_batch_size=4")
    assert code == 4
    assert "out of memory in the evaluation at step 1" in err
    assert "train.per_device_eval_batch_size: 2" in err
