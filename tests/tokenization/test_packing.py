"""Packing told straight: documents of a pack do not see each other, and a pack's loss is that of its rows."""

import pytest
import torch
from conftest import jsonl
from transformers import AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from trl_sft import load_recipe
from trl_sft.recipe import paths
from trl_sft.training import stages
from trl_sft.training.stages import build_trainer

TEXT = (
    "model: {name_or_path: trl_sft:tiny}\ndata: {train: r.jsonl, eval: held.jsonl}\n"
    "train: {output_dir: out, max_steps: 1, max_length: 256, per_device_eval_batch_size: 3}\nevaluate: false\n"
)


@pytest.fixture
def ready(here):
    def call(*words):
        rows = [{"question": "q " * (n % 9 + 1), "answer": "yes " * (n % 17 + 1) + str(n)} for n in range(90)]
        jsonl(here / "r.jsonl", rows[:70])
        jsonl(here / "held.jsonl", rows[70:])
        (here / "recipe.yaml").write_text(TEXT, encoding="utf-8")
        run = load_recipe("recipe.yaml", words)
        made = stages.prepare(run)
        return made, build_trainer(run, made)

    return call


def logits(model, batch):
    with torch.no_grad():
        names = ("input_ids", "position_ids", "attention_mask")
        given = {name: batch[name] for name in names if name in batch}
        return model(**given, use_cache=False).logits[
            0
        ]  # as the Trainer calls it: with a cache transformers keeps no borders


def differences(model, packs, documents):
    """Return the largest difference between a document's logits in its pack and alone, over all documents."""
    flat = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(packs)
    together, start, worst = logits(model, flat), 0, 0.0
    for ids in documents:
        alone = logits(model, {"input_ids": torch.tensor([ids])})
        worst = max(worst, float((together[start : start + len(ids)] - alone).abs().max()))
        start += len(ids)
    assert start == flat["input_ids"].shape[1]
    return worst


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch 2.13 and transformers 5.23 about each other
@pytest.mark.parametrize(
    "attention",
    ["sdpa", "eager", pytest.param("flex_attention", marks=pytest.mark.long)],  # it compiles, 40 s
)
@pytest.mark.parametrize("strategy", ["bfd", "bfd_split"])
def test_document_in_a_pack_gives_the_logits_that_it_gives_alone(attention, strategy, ready):
    made, _ = ready("train.packing=true", f"train.packing_strategy={strategy}")
    model = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny", attn_implementation=attention)
    packs = [made.datasets.train[n] for n in range(2)]
    documents = []
    for pack in packs:
        start = 0
        for length in pack["seq_lengths"]:
            documents.append(pack["input_ids"][start : start + length])
            start += length
    assert len(documents) > 3
    try:
        assert differences(model, packs, documents) < 1e-5
    except (ImportError, NotImplementedError, RuntimeError) as error:
        pytest.skip(f"{attention} does not run here: {str(error)[:80]}")


def test_wrapped_packs_leak_which_is_why_they_have_to_be_allowed(ready):
    made, _ = ready("train.packing=true", "train.packing_strategy=wrapped", "run.allow=[leaking_packing]")
    whole, _ = ready()
    model = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny")
    pack = made.datasets.train[0]["input_ids"]
    first, second = (whole.datasets.train[n]["input_ids"] for n in range(2))
    assert pack[: len(first)] == first
    length = min(len(second), len(pack) - len(first))
    together = logits(model, {"input_ids": torch.tensor([pack])})[len(first) : len(first) + length]
    alone = logits(model, {"input_ids": torch.tensor([second])})[:length]
    assert float((together - alone).abs().max()) > 1e-3


def token_loss(trainer):
    """Return the mean loss of a trained token over all held-out rows."""
    total = count = 0
    trainer.model.eval()
    for batch in trainer.get_eval_dataloader():
        with torch.no_grad():
            loss = trainer.compute_loss(trainer.model, dict(batch))
        number = int((batch["labels"][:, 1:] != -100).sum())
        total, count = total + float(loss) * number, count + number
    return total / count, count


def test_held_out_loss_of_a_token_is_the_same_packed_and_not(ready):
    (packed, number), (alone, same) = (
        token_loss(ready("train.packing=true", f"train.eval_packing={packing}")[1]) for packing in ("true", "false")
    )
    assert number == same
    assert packed == pytest.approx(alone, abs=1e-4)
