"""Verification: a difference between the recipe and the live trainer stops the run and is named.

What upstream accepts and then ignores or changes without a word, as far as a recipe reaches it, and the test that holds
what becomes of it here (this file where none is named):

| upstream, without a word | here | test |
|---|---|---|
| drops a misspelt key; takes a list for a number, 512.5 for a length, any packing strategy | refused | recipe/test_bad_input, upstream/test_fields |
| reads 2e-5 as text, `no` as false, the last of two equal keys | read as a number and as text; the second key is refused | recipe/test_yaml_reader |
| keeps unknown words of GenerationConfig | refused | evaluation/test_before_after: wrong_evaluate_section |
| no longer knows `warmup_ratio` and other old names | read as today's name, with a note | recipe/test_renamed_keys; test_effects |
| ignores keys of the other kind of quantization | refused | recipe/test_bad_input |
| ignores quantization beside weights that were saved quantized, and the dtype of a loaded model | refused; handed to the loading | model/test_quantization; dtype_of_a_model |
| computes 4-bit layers in the dtype of the weights | set, with a note | model/test_quantization |
| fp16 on a CPU; eval_steps without eval_strategy; load_best without checkpoints | refused | recipe/test_bad_input; test_run |
| cuts rows, drops rows without a token with loss | counted, named, refused over a share | tokenization/test_ledger; test_effects |
| lets documents of `wrapped` packs see each other | refused until allowed | tokenization/test_ledger |
| believes the generation markers of a template | compared, refused | tokenization/test_loss_mask |
| trains the prompt of plain text too | loss on the response | tokenization/test_loss_mask |
| ends a mix with its first source, or repeats rows | exact shares, shown | tokenization/test_ledger |
| draws test rows without a seed | drawn with the run's seed | tokenization/test_ledger |
| adds new tokens that nothing trains | trained, counted | tokenization/test_special_tokens |
| logs NaN as 0 | the run ends | test_run |
| skips `lora.target_modules` and `modules_to_save` that no module has | refused | names_without_a_module |
| keeps the checkpoint's learning rate and betas, whatever the recipe says now | refused | resumed_with_another_learning_rate |
| runs one process, or plain DDP, where the recipe sets FSDP or several processes | refused | processes, engine |
| replaces the accumulation by `accelerator_config` | refused | accumulation_that_another_key_replaces |
| replaces a number in its arguments | refused | changed arguments |
| leaves weights as they were where updates are too small for their dtype | the run fails, or tensors are named | updates_too_small |
| runs pickles and code of a model, telemetry, trackers | refused, off | model/test_trust |

Not planted any more, since upstream copies them from its arguments and they cannot differ: the schedule's later rates,
warm-up, LoRA's rank, scale and dropout, NEFTune's noise, the seed, activation checkpointing, trackers, the number of
steps, the loader's batch size (the rows of each step are counted instead).
"""  # noqa: E501

import json
import re
import types

import pytest
import torch
from conftest import RECIPE, jsonl

from trl_sft.errors import NotAsAsked
from trl_sft.model import cpu_loss
from trl_sft.training import live, verify

LORA = ("lora={r: 4, lora_dropout: 0.1}",)
SMOOTHING = ("train.label_smoothing_factor=0.1", "train.loss_type=nll")  # TRL 1.8 to 1.14 smooth under nll only
EPOCH = ("train.max_steps=-1", "train.num_train_epochs=1")
CPU16 = ("train.bf16=true", "train.use_cpu=true")


@pytest.fixture
def run_with(go, here, monkeypatch):
    """Run the recipe with a difference planted before the first comparison, or `late`, after it."""

    def call(plant, *words, late=False, text=RECIPE):
        real = verify.Verification.on_train_begin

        def begin(self, args, state, control, **kwargs):
            if late:
                real(self, args, state, control, **kwargs)
            plant(
                types.SimpleNamespace(
                    trainer=self._trainer,
                    model=self._trainer.model,
                    args=args,
                    state=state,
                    **{
                        "loader": kwargs["train_dataloader"],
                        "patch": monkeypatch,
                        "groups": self._trainer.optimizer.param_groups,
                    },
                )
            )
            if not late:
                real(self, args, state, control, **kwargs)

        monkeypatch.setattr(verify.Verification, "on_train_begin", begin)
        try:
            code, out, err = go(text, *words)
        except NotAsAsked as error:
            return 1, "", str(error)
        return code, out, err

    return call


def layers(live):
    base = live.model.get_base_model() if hasattr(live.model, "get_base_model") else live.model
    return base.model.layers


def without_forward(live):
    live.model.forward = types.MethodType(type(live.model).forward.__wrapped__, live.model)


def another_optimizer(live):
    live.trainer.optimizer.optimizer = torch.optim.SGD(live.groups, lr=2e-5)


def plain_linear(live):
    layer = layers(live)[0].mlp.up_proj
    layers(live)[0].mlp.up_proj = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)


def another_quantization(live):
    for module in live.model.modules():
        if type(module).__name__ == "Linear4bit" and hasattr(module.weight, "quant_state"):
            module.weight.quant_state.quant_type = "fp4"


def set_eval_mode(live):
    live.model.eval()
    live.model.train = lambda mode=True: live.model


def drop_half_of_a_step(live):
    real = live.trainer.get_batch_samples

    def fewer(*args):
        batches, number = real(*args)
        return [{name: value[:1] for name, value in batch.items()} for batch in batches], number

    live.patch.setattr(live.trainer, "get_batch_samples", fewer)


def set_to(path, value):
    """Return a plant that sets what the path names, from trainer, model, state, args, loader or groups."""

    def plant(live):
        names = path.split(".")
        found = live
        for name in names[:-1]:
            found = found[int(name)] if name.isdigit() else getattr(found, name)
        if isinstance(found, dict):
            found[names[-1]] = value
        else:
            setattr(found, names[-1], value)

    return plant


# name: the plant, the overrides of the recipe, whether it comes after the first comparison, exit code, the message
DIFFERENCES = {
    "learning rate": (
        lambda live: setattr(live.trainer.lr_scheduler, "base_lrs", [3e-4, 3e-4]),
        *((), False, 1, "learning rate: the recipe asks for 2e-05, but the live trainer has 0.0003"),
    ),
    "learning rate that is written": (
        lambda live: setattr(live.trainer.lr_scheduler, "base_lrs", [3e-4, 3e-4]),
        ("train.learning_rate=1e-3",),
        *(
            False,
            2,
            "(train.learning_rate=1e-3) train.learning_rate\n    learning rate: the recipe asks for 0.001, but",
        ),
    ),
    "betas": (
        set_to("groups.0.betas", (0.5, 0.9)),
        *((), False, 1, "optimizer betas: the recipe asks for 0.9, 0.999, but the live trainer has"),
    ),
    "weight decay": (
        set_to("groups.1.weight_decay", 0.5),
        ("train.weight_decay=0.1",),
        *(False, 2, "weight decay: the recipe asks for 0.1, but the live trainer has 0.1, 0.5"),
    ),
    "optimizer": (
        another_optimizer,
        *((), False, 1, "optimizer: the recipe asks for AdamW, but the live trainer has SGD"),
    ),
    "optimizer that lacks a parameter": (
        lambda live: live.groups[0]["params"].pop(),
        *((), False, 1, "parameters missing from optimizer: model.layers.1.mlp.down_proj.weight"),
    ),
    "frozen layer of the adapter": (
        lambda live: layers(live)[1].self_attn.q_proj.lora_A.default.requires_grad_(False),
        *(LORA, False, 1, "frozen parameters: base_model.model.model.layers.1.self_attn.q_proj.lora_A"),
    ),
    "base that is trained too": (
        lambda live: layers(live)[0].mlp.up_proj.weight.requires_grad_(True),
        *(LORA, False, 1, "unexpected trainable parameters: base_model.model.model.layers.0.mlp.up_proj.weight"),
    ),
    "frozen parameter": (
        lambda live: layers(live)[0].mlp.up_proj.weight.requires_grad_(False),
        *((), False, 1, "frozen parameters: model.layers.0.mlp.up_proj.weight"),
    ),
    "dtype": (
        lambda live: layers(live)[0].mlp.up_proj.half(),
        *(("model.dtype=float32",), False, 2),
        "weight dtypes: the recipe asks for float32, but the live trainer has float16, float32",
    ),
    "dtype of the adapter": (
        lambda live: layers(live)[0].self_attn.q_proj.lora_B.half(),
        *(LORA, False, 1, "adapter dtypes: the recipe asks for float32, but the live trainer has float16, float32"),
    ),
    "attention": (
        lambda live: setattr(live.model.config, "_attn_implementation", "eager"),
        *((), False, 1, "attention: the recipe asks for sdpa, but the live trainer has eager"),
    ),
    "attention that is written": (
        lambda live: setattr(live.model.config, "_attn_implementation", "eager"),
        *(("train.packing=true", "model.attn_implementation=sdpa"), False, 2, "attention: the recipe asks for sdpa"),
    ),
    "loss": (
        without_forward,
        *((), False, 1, "loss: the recipe asks for trl_sft.model.cpu_loss, but the live trainer has trl"),
    ),
    "rows of a micro batch": (
        drop_half_of_a_step,
        *(
            (),
            True,
            2,
            "recipe.yaml:6 train.per_device_train_batch_size\n    rows per step: the recipe asks for 2",
        ),
    ),
    "rows of a step": (
        drop_half_of_a_step,
        *(("train.gradient_accumulation_steps=2",), True, 2, "rows per step: the recipe asks for 4, but"),
    ),
    "processes": (
        lambda live: live.patch.setenv("WORLD_SIZE", "2"),
        *((), False, 1, "processes: the recipe asks for 2, but the live trainer has 1"),
    ),
    "engine": (
        lambda live: live.patch.setenv("ACCELERATE_USE_FSDP", "true"),
        *((), False, 1, "engine: the recipe asks for FSDP, but the live trainer has one process"),
    ),
    "training mode": (set_eval_mode, (), True, 1, "modules in eval mode: LlamaForCausalLM, model, "),
    "autocast": (
        lambda live: setattr(live.model, "forward", live.model._original_forward),
        *(CPU16, True, 2, "autocast dtype: the recipe asks for bfloat16, but the live trainer has none"),
    ),
    "documents": (
        lambda live: setattr(live.trainer.data_collator, "padding_free", False),
        *(("train.packing=true",), True, 2, "documents separated: the recipe asks for True, but the live trainer has"),
    ),
    "adapter merged": (
        lambda live: live.model.merge_adapter(),
        *(LORA, False, 1, "adapter: the recipe asks for on, but the live trainer has merged"),
    ),
    "adapter off": (
        lambda live: live.model.base_model.disable_adapter_layers(),
        *(LORA, False, 1, "adapter: the recipe asks for on, but the live trainer has off"),
    ),
    "changed arguments": (
        set_to("args.max_grad_norm", 0.5),
        *(("train.max_grad_norm=1.0",), False, 2, "changed arguments: max_grad_norm: 1.0 became 0.5"),
    ),
    "layer that is not quantized": (
        plain_linear,
        *((*LORA, "quantization={load_in_8bit: true}"), False, 2),
        "linear layers not quantized: base_model.model.model",
    ),
    "kind of quantization": (
        another_quantization,
        ("lora={r: 4}", "quantization={load_in_4bit: true, bnb_4bit_quant_type: nf4}"),
        *(
            False,
            2,
            "quantization: the recipe asks for 4-bit nf4, computed in float32, but the live trainer has 4-bit",
        ),
    ),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_planted_difference_stops_the_run_and_is_named(name, run_with, here):
    if name == "loss" and not cpu_loss.AVAILABLE:
        pytest.skip("this TRL has another head: its own loss stays")
    plant, overrides, late, expected_code, message = DIFFERENCES[name]
    code, _, output = run_with(plant, *overrides, late=late)
    assert message in output
    assert code == expected_code
    assert not (here / "out" / "model.safetensors").exists()
    if not late:
        assert not (here / "out" / "run.json").exists()


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("train.packing=true", "train.gradient_accumulation_steps=2", "train.max_length=128"),
        ("lora={r: 4, target_modules: all-linear, modules_to_save: [lm_head]}", "model.dtype=bfloat16"),
        (*CPU16, "train.lr_scheduler_type=cosine_with_min_lr", "train.lr_scheduler_kwargs={min_lr: 1e-6}"),
        ("train.lr_scheduler_type=constant_with_warmup", "train.warmup_steps=1", "train.neftune_noise_alpha=5"),
        ("train.optim=adafactor", "train.weight_decay=0.1"),
        ("train.optim=sgd", "train.num_train_epochs=0.2", "train.max_steps=-1"),
        ("train.lr_scheduler_type=reduce_lr_on_plateau", "data.eval_fraction=0.2", "train.eval_strategy=epoch"),
        ("lora={r: 4, use_rslora: true, use_dora: true, bias: all, rank_pattern: {q_proj: 8}}",),
        ("train.dataloader_drop_last=true", "train.per_device_train_batch_size=16", *EPOCH),
    ],
    ids=lambda words: " ".join(words) or "as it is",
)
def test_run_without_a_difference_matches_in_every_property_and_records_it(words, go, here):
    code, out, err = go(RECIPE, *words)
    assert code == 0, err
    assert re.search(r"verified +\d+ properties of the live trainer match the recipe", out)
    end = json.loads((here / "out" / "run.json").read_text())["measured"]["after_training"]
    assert end["optimizer_steps"] == end["finished_steps"] == end["planned_steps"]
    assert end["changed_tensors"] > 0
    assert f"Trained: {end['optimizer_steps']} step" in out


@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_and_tokens_are_those_of_the_ledger_after_whole_epochs(packing, go, here):
    jsonl(here / "rows.jsonl", [{"question": f"What is {n}?", "answer": "x " * n} for n in range(1, 14)])
    words = ("train.max_steps=-1", "train.num_train_epochs=2", f"train.packing={packing}", "train.max_length=64")
    code, out, err = go(RECIPE, *words, "train.gradient_accumulation_steps=3")
    assert code == 0, err
    end = json.loads((here / "out" / "run.json").read_text())["measured"]["after_training"]
    ledger = json.loads((here / "out" / "ledger.json").read_text())["train"]
    assert end["loss_tokens"] == 2 * ledger["tokens"]["loss"]
    rows = 13 if packing == "false" else int(re.search(r"(\d+) packs of 64", out).group(1))
    assert end["rows"] == 2 * rows


@pytest.mark.parametrize(
    "overrides",
    [
        (*SMOOTHING,),
        (*SMOOTHING, "train.gradient_accumulation_steps=3"),
        ("train.loss_type=dft",),
        ("train.loss_type=chunked_nll",),
        (*SMOOTHING, "train.packing=true", "train.max_length=64"),
        (*SMOOTHING, "train.eval_strategy=steps", "train.eval_steps=1"),
        ("lora={r: 4, target_modules: all-linear}", "train.loss_type=dft"),
    ],
    ids=" ".join,
)
@pytest.mark.filterwarnings("ignore:.*label_smoothing:FutureWarning")
def test_loss_tokens_are_those_of_the_ledger_whichever_loss_reads_the_labels(overrides, go, here):
    words = ("train.max_steps=-1", "train.num_train_epochs=1", *overrides)
    recipe = RECIPE.replace("rows.jsonl}", "rows.jsonl, eval_fraction: 0.2}")
    code, out, err = go(recipe, *words)
    assert code == 0, err
    end = json.loads((here / "out" / "run.json").read_text())["measured"]["after_training"]
    ledger = json.loads((here / "out" / "ledger.json").read_text())["train"]
    assert end["loss_tokens"] == ledger["tokens"]["loss"] > 0
    assert f"{end['loss_tokens']} of them with loss" in out


def test_tensor_that_training_does_not_change_is_named_on_the_last_screen(run_with, here):
    def no_gradient(live):
        layers(live)[1].mlp.up_proj.weight.register_hook(torch.zeros_like)

    code, out, _ = run_with(no_gradient, late=True)
    assert code == 0
    assert "19 of 20 trainable tensors changed\n  unchanged: model.layers.1.mlp.up_proj.weight" in out


def test_updates_too_small_for_the_dtype_are_shown(go):
    words = ("model.dtype=bfloat16", "train.learning_rate=1e-7")
    code, out, _ = go(RECIPE, *words)
    assert code == 0
    assert re.search(r"only [\d.]+% of the weights changed: .* Set model.dtype: float32", out)


def test_run_that_changes_no_weight_ends_with_3(run_with, here):
    code, _, err = run_with(lambda live: live.patch.setattr(live.trainer.optimizer, "step", lambda *_: None), late=True)
    assert code == 3
    assert "no trainable weight changed in 2 steps; no model is saved" in err
    assert not (here / "out" / "model.safetensors").exists()


def test_step_at_a_learning_rate_of_zero_is_no_failure(go):
    code, out, _ = go(RECIPE, "train.warmup_steps=1", "train.max_steps=1")
    assert code == 0
    assert "0 of 20 trainable tensors changed" in out


@pytest.mark.parametrize(
    ("lora", "name"),
    [
        ("{r: 4, target_modules: [q_proj, w_proj]}", "w_proj"),
        ("{r: 4, target_modules: [q_proj], modules_to_save: [lm_head, classifier]}", "classifier"),
    ],
)
def test_names_without_a_module_are_refused_where_peft_passes_them_over(lora, name, go, here):
    code, _, err = go(RECIPE, f"lora={lora}")
    assert code == 2
    assert f"{name}: the model has no module of this name" in err
    assert not (here / "out").exists()


def test_resumed_with_another_learning_rate_is_refused(go, here):
    saving = ("train.save_strategy=steps", "train.save_steps=1", "train.max_steps=3")
    assert go(RECIPE, *saving, "run.max_hours=1e-9", "train.learning_rate=1e-3")[0] == 75
    code, _, err = go(RECIPE, *saving, "run.allow=[changed_recipe]", "train.learning_rate=5e-4")
    assert code == 2
    assert "train.learning_rate" in err
    assert "train.learning_rate: 0.001 -> 0.0005" in err
    assert go(RECIPE, *saving, "train.learning_rate=1e-3")[0] == 0


def test_accumulation_that_another_key_replaces_is_refused(go):
    words = ("train.accelerator_config={gradient_accumulation_kwargs: {num_steps: 3}}",)
    code, _, err = go(RECIPE, *words, "train.gradient_accumulation_steps=1")
    assert code == 2
    assert "gradient_accumulation_steps: 1 became 3" in err


def test_dtype_of_a_model_that_this_package_loads_is_the_recipes(go, here):
    words = ("tokenizer.extra_special_tokens=['<|new|>']", "model.dtype=bfloat16")
    code, _, err = go(RECIPE, *words)
    assert code == 0, err
    assert json.loads((here / "out" / "run.json").read_text())["measured"]["before_training"]["weight_dtypes"] == [
        "bfloat16"
    ]


@pytest.mark.parametrize(
    ("engine", "weights", "expected"),
    [
        ("FSDP", torch.bfloat16, "bfloat16"),  # the engine gives the layers such weights, without autocast
        ("ZeRO-2", torch.bfloat16, "bfloat16"),
        ("FSDP", torch.float32, "float32"),  # it does not: the run is refused
        ("DDP", torch.bfloat16, None),  # accelerate uses autocast, and it is off
    ],
)
def test_precision_of_an_engine_without_autocast_is_that_of_the_weights_it_computes_with(
    engine, weights, expected, monkeypatch
):
    monkeypatch.setattr(live, "live_engine", lambda trainer: engine)
    trainer = types.SimpleNamespace(args=types.SimpleNamespace(bf16=True, fp16=False))
    assert verify.read_computed_dtype(trainer, torch.nn.Embedding(2, 2, dtype=weights)) == expected
