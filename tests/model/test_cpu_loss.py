"""The loss without Triton and attention by document give what TRL's give: losses, metrics, gradients."""

import json

import models
import pytest
import torch
from conftest import QUESTIONS, jsonl
from transformers import AutoModelForCausalLM
from trl.trainer import utils

from trl_sft import load_recipe
from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.recipe import paths
from trl_sft.training import stages
from trl_sft.training.stages import build_trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"  # transformers 5.23 in its own Trainer
)
TEXT = (
    "model: {{name_or_path: {model}}}\ndata: {{train: rows.jsonl}}\nevaluate: false\n{more}"
    "train: {{output_dir: out, max_steps: 3, per_device_train_batch_size: 2, logging_steps: 1, save_strategy: 'no'}}\n"
)
needs_fused_head = pytest.mark.skipif(not patches.expects_fused_head(), reason="this TRL is older than its fused head")


def train(here, faster, *words, model="trl_sft:tiny", more=""):
    """Train three steps with our loss and attention, or with TRL's; return log and gradients' sizes."""
    jsonl(here / "rows.jsonl", QUESTIONS)
    (here / "recipe.yaml").write_text(TEXT.format(model=model, more=more), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        if not faster:
            patch.setattr(cpu_loss, "install", lambda *_: False)
            patch.setattr(packed_attention, "install", lambda *_: False)
        run = load_recipe("recipe.yaml", words)
        trainer = build_trainer(run, stages.prepare(run))
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    names = ("loss", "grad_norm", "entropy", "mean_token_accuracy", "num_tokens")
    return [[entry[name] for name in names] for entry in entries], trainer


CASES = {
    "plain": [],
    "packed": ["train.packing=true", "train.max_length=128"],
    "accumulated": ["train.gradient_accumulation_steps=2"],
    "lora": ["lora={r: 4, target_modules: all-linear}"],
    "lora_packed": ["lora={r: 4}", "train.packing=true", "train.max_length=128"],
    "label_smoothing": ["train.label_smoothing_factor=0.1"],
    "dft": ["train.loss_type=dft"],
    "checkpointing": ["train.activation_checkpointing=true"],
    "all_tokens": ["data.loss_on=all"],
    "small_chunks": ["run.logits_gib=0.00001"],
}


@needs_fused_head
@pytest.mark.filterwarnings("ignore:`label_smoothing_factor` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_training_logs_what_trl_logs(case, here):
    actual, trainer = train(here, True, *CASES[case])
    expected, reference = train(here, False, *CASES[case])
    assert len(actual) == 3
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)
    for one, other in zip(trainer.model.parameters(), reference.model.parameters(), strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=2e-6)


def build(kind):
    """Return a small model whose head has something of its own."""
    from transformers import AutoConfig

    text = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": 1}
    own = {
        "llama": {},
        "llama_tied": {"tie_word_embeddings": True},
        "gemma2": {"final_logit_softcapping": 5.0, "sliding_window": 16, "attn_logit_softcapping": None},
        "granite": {"logits_scaling": 4.0},
        "cohere": {"logit_scale": 0.5},
        "mistral": {"sliding_window": 16},
        "exaone4": {"sliding_window": 16, "num_hidden_layers": 4},
    }.get(kind, {})
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind.removesuffix("_tied"), **text | own)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager" if kind == "gemma2" else "sdpa")


def batch(packed, empty=False):
    """Return labelled tokens: two padded rows, or the same documents in one row with their borders."""
    torch.manual_seed(1)
    lengths = [40, 23]
    documents = [torch.randint(2, 300, (length,)) for length in lengths]
    labels = [torch.where(torch.rand(len(ids)) < 0.6, ids, -100) for ids in documents]
    if empty:
        labels = [torch.full_like(part, -100) for part in labels]
    if not packed:
        stack = torch.nn.utils.rnn.pad_sequence
        mask = [torch.ones_like(ids) for ids in documents]
        return {
            "input_ids": stack(documents, True, 0),
            "labels": stack(labels, True, -100),
            "attention_mask": stack(mask, True, 0),
        }
    for part in labels:
        part[0] = -100
    borders = torch.tensor([0, 40, 63], dtype=torch.int32)
    return {
        "input_ids": torch.cat(documents)[None],
        "labels": torch.cat(labels)[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": 40,
        "max_length_k": 40,
    }


KINDS = ["llama", "llama_tied", "gemma2", "granite", "cohere", "mistral"]


def score(model, inputs):
    output = model(**inputs, fused_lm_head=True, use_cache=False)
    weights = torch.linspace(0.5, 1.5, output.log_probs.numel()).view_as(output.log_probs)
    (output.log_probs * weights).sum().backward()  # as DFT: every position has a weight of its own
    return output, {name: p.grad.clone() for name, p in model.named_parameters()}


@needs_fused_head
@pytest.mark.parametrize("gib", [1.0, 1e-5])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_and_gradients_are_trls(kind, packed, gib):
    """Soft-capped, scaled, tied; logits stored for the backward pass, or computed twice in small pieces."""
    results = []
    for faster in (False, True):
        model = build(kind)
        utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        if faster:
            assert cpu_loss.install(model, gib)
            assert packed_attention.install(model) or kind == "gemma2"
        results.append(score(model, batch(packed)))
    (expected, reference), (actual, gradients) = results
    for name in ("log_probs", "entropy"):
        assert torch.allclose(getattr(actual, name), getattr(expected, name), rtol=1e-5, atol=1e-5), name
    assert torch.equal(actual.is_top1.bool(), expected.is_top1.bool())
    assert torch.equal(actual.label_mask, expected.label_mask)
    for name, gradient in gradients.items():
        scale = reference[name].abs().max().clamp(min=1e-6)
        assert float((gradient - reference[name]).abs().max() / scale) < 1e-5, name


@needs_fused_head
def test_batch_without_a_label_gives_a_loss_of_zero_with_a_gradient():
    model = build("llama")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert cpu_loss.install(model, 1.0)
    output, gradients = score(model, batch(False, empty=True))
    assert float(output.log_probs.detach().abs().sum()) == 0.0
    assert all(float(gradient.abs().sum()) == 0.0 for gradient in gradients.values())


@needs_fused_head
def test_trls_functions_are_back_after_every_forward():
    before = utils._ChunkedLogProbFunction, utils._use_triton
    model = build("llama")
    utils.add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    assert cpu_loss.install(model, 1.0)
    score(model, batch(False))
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before
    with pytest.raises(ValueError, match="input_ids"):
        model(input_ids=None, labels=torch.ones(1, 2), fused_lm_head=True)
    assert (utils._ChunkedLogProbFunction, utils._use_triton) == before


def test_borders_come_from_the_positions_where_nobody_hands_them_along():
    model = build("llama")
    inputs = {name: batch(True)[name] for name in ("input_ids", "position_ids")}
    alone = [model(ids[None], use_cache=False).logits[0] for ids in inputs["input_ids"][0].split([40, 23])]
    assert packed_attention.install(model)
    together = model(**inputs, use_cache=False).logits[0]
    assert float((together - torch.cat(alone)).detach().abs().max()) < 1e-5
    query = torch.zeros(1, 4, 63, 8)
    empty = packed_attention.make_mask(attention_mask=None, allow_is_causal_skip=False, device="cpu")
    with pytest.raises(RuntimeError, match="packed rows have no document borders"):
        packed_attention.attend(model.model.layers[0].self_attn, query, query, query, empty)


@pytest.mark.parametrize("kind", ["stablelm", "nemotron", "exaone4"])
def test_model_that_hands_no_borders_along_is_left_alone_or_separated(kind):
    model = build(kind)
    inputs = {name: value for name, value in batch(True).items() if name != "labels"}
    alone = [model(ids[None], use_cache=False).logits[0] for ids in inputs["input_ids"][0].split([40, 23])]
    packed_attention.install(model)
    together = model(**inputs, use_cache=False).logits[0]
    assert float((together - torch.cat(alone)).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_attention_by_document_gives_the_logits_of_each_document_alone(kind):
    model = build(kind)
    inputs = {name: value for name, value in batch(True).items() if name != "labels"}
    alone = [model(ids[None], use_cache=False).logits[0] for ids in inputs["input_ids"][0].split([40, 23])]
    assert packed_attention.install(model)
    together = model(**inputs, use_cache=False).logits[0]
    assert float((together - torch.cat(alone)).detach().abs().max()) < 1e-5


def test_generation_is_the_same_with_attention_by_document():
    model = build("llama").eval()
    inputs = {name: value for name, value in batch(False).items() if name != "labels"}
    flipped = {name: value.flip(1) for name, value in inputs.items()}  # padded on the left
    before = model.generate(**flipped, max_new_tokens=8, do_sample=False)
    assert packed_attention.install(model)
    assert torch.equal(model.generate(**flipped, max_new_tokens=8, do_sample=False), before)


def test_run_says_which_loss_and_attention_it_takes_and_a_recipe_overrides(here, go):
    text = TEXT.format(model="trl_sft:tiny", more="")
    code, out, _ = go(text, "train.packing=true", "train.max_length=128")
    assert code == 0
    assert "attention    sdpa, one call for each document of a pack" in out
    if patches.expects_fused_head():
        assert "loss         on positions with a label only, at most 0.5 GiB of logits" in out
    saved = json.loads((here / "out" / "config.json").read_text())
    assert "documents" not in json.dumps(saved)
    code, out, _ = go(text, "train.packing=true", "model.attn_implementation=eager", "train.output_dir=other")
    assert code == 0
    assert "attention    eager\n" in out


def test_new_tokens_with_a_tied_head_under_lora_train_with_this_loss(here):
    models.base(here / "base", tied=True)
    words = ["lora={r: 4}", "tokenizer.chat_template=chatml", f"model.name_or_path={here / 'base'}"]
    actual, _ = train(here, True, *words)
    expected, _ = train(here, False, *words)
    for one, other in zip(actual, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-5, abs=1e-6)


def test_model_that_attends_otherwise_is_left_alone():
    model = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny", attn_implementation="eager")
    assert not packed_attention.install(model)
    assert model.config._attn_implementation == "eager"
