"""Upstream's private parts are touched in named places alone, and are what those places were written for.

A test that fails here after an upgrade names a function: read its docstring, adapt it to the new version, or delete it.
"""

import ast
import importlib
import inspect
import sys
from pathlib import Path

import models
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel
from trl import SFTTrainer
from trl.trainer import utils

import trl_sft
from trl_sft.data import code_digest
from trl_sft.model import cpu_loss, packed_attention, patches
from trl_sft.recipe import paths

PACKAGE = Path(trl_sft.__file__).parent
NAMED_TUPLE = {"_replace", "_asdict", "_fields", "_make"}  # public, in spite of the underscore
BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
# file -> private names of upstream that it touches; a new line needs a version in its docstring and a test below
ALLOWED = {
    "data/code_digest.py": {"_fingerprint"},
    "data/load.py": {"_fingerprint"},
    "evaluation/checks/sandbox_child.py": {"_exit"},  # os._exit: the parent of the sandbox has nothing to clean up
    "model/patches.py": {
        *("_attn_implementation", "_from_config", "_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"),
        *("_orig_mod", "_use_triton", "_ChunkedLogProbFunction"),
        *("_set_signature_columns_if_needed", "_signature_columns"),
    },
    "evaluation/task_suites.py": {"_instances", "_yaml_loader"},  # lm-eval 0.4.13
    "serving/adapter_layers.py": {"_move_adapter_to_device_of_base_layer"},  # peft 0.21: layers of the meta device stay
    "serving/base_tensors.py": {"_from_config"},
    "tokenization/special_tokens.py": {"_tokenizer", "_extra_special_tokens"},
    "tokenization/template_limits.py": {"_exit"},  # os._exit: the copy of the process runs no clean-up
    "training/live_parallelism.py": {"_cp_context"},  # accelerate 1.12 to 1.15: context parallelism was prepared
    "training/memory/chunked_loss.py": {  # trl 1.8 to 1.14
        *("_patch_chunked_ce_lm_head", "_CHUNKED_LM_HEAD_CHUNK_SIZE", "_chunk", "_chunked_cross_entropy_loss"),
    },
    "training/memory/cuda_kernels.py": {
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention",
    },
    "training/memory/fake_tensors.py": {
        *("_subclasses", "_python_dispatch", "_disable_current_modes", "_pytree", "_cdata"),
    },
    "training/resume.py": {
        *("_finalize_training", "_globalstep_last_logged", "_metrics", "_total_loss_scalar", "_total_train_tokens"),
        "_tr_loss",
    },
    "training/save_trial.py": {"_save_optimizer_and_scheduler", "_save_rng_state"},
    "training/time_probe.py": {"_metrics", "_total_train_tokens"},
    "training/trackers.py": {"_trackio", "_wandb"},  # the packages as the callbacks of transformers 5.23 import them
}


def is_private(name):
    return name.startswith("_") and not name.startswith("__") and name not in NAMED_TUPLE


def private_names(path):
    """Return the private names of others that a file reads, sets, imports or names as text for getattr and its like."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours = set()  # modules of ours under their local names: tests/test_structure.py looks after those
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "trl_sft":
            ours |= {alias.asname or alias.name for alias in node.names}
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value.id if isinstance(node.value, ast.Name) else ""
            if owner not in {"self", "cls"} | ours:
                names.add(node.attr)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] != "trl_sft":
            names |= {*node.module.split("."), *(alias.name for alias in node.names)}
        elif isinstance(node, ast.Import):
            names |= {part for alias in node.names for part in alias.name.split(".")}
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BY_NAME:
            names |= {node.args[1].value} if isinstance(node.args[1], ast.Constant) else set()
    return {name for name in names if is_private(name)}


def test_private_parts_of_upstream_are_touched_in_named_places_alone():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 80
    touched = {path.relative_to(PACKAGE).as_posix(): private_names(path) for path in files}
    assert {name: private for name, private in touched.items() if private} == ALLOWED


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from torch._subclasses import fake_tensor", {"_subclasses"}),
        ("import torch._dynamo", {"_dynamo"}),
        ("from trl.trainer.utils import _use_triton", {"_use_triton"}),
        ("getattr(config, '_attn_implementation', None)", {"_attn_implementation"}),
        ("model.inner()._hooks[0]._name = 1", {"_hooks", "_name"}),
        ("self._mine, batch._replace(rows=1), type(model).__name__", set()),
        ("from trl_sft.recipe import build\nbuild._line", set()),
    ],
)
def test_scan_sees_private_names_in_every_form(text, expected, tmp_path):
    (tmp_path / "module.py").write_text(text)
    assert private_names(tmp_path / "module.py") == expected


@pytest.mark.parametrize(
    ("name", "home"), [("get_base_model", "model/load.py"), ('"adapter_config.json"', "run_folder.py")]
)
def test_name_of_peft_stands_in_one_module(name, home):
    files = [path for path in PACKAGE.rglob("*.py") if name in path.read_text(encoding="utf-8")]
    assert [path.relative_to(PACKAGE).as_posix() for path in files] == [home]


# TRL's fused head

needs_fused_head = pytest.mark.skipif(not patches.expects_fused_head(), reason="this TRL is older than its fused head")


@needs_fused_head
def test_our_loss_fits_every_trl_that_has_the_fused_head():
    assert patches.find_fused_head_problem() == "", f"adapt patches.replace_fused_loss to TRL {trl.__version__}"
    assert cpu_loss.AVAILABLE
    assert cpu_loss.replaces_trl_loss(torch.device("cpu"))
    assert cpu_loss.describe_mismatch(torch.device("cpu")) == ""


@needs_fused_head
def test_trainer_asks_its_fused_head_for_the_values_that_our_loss_returns():
    source = inspect.getsource(SFTTrainer)
    assert 'outputs=("log_probs", "entropy", "is_top1")' in source.replace("\n", "")
    call = inspect.getsource(utils.add_fused_lm_head)
    assert "log_probs, entropy, log_sum_sq_probs, mean_logits, is_top1 = per_token" in call


@needs_fused_head
@pytest.mark.parametrize("change", ["another argument", "no function", "no head"])
def test_another_fused_head_leaves_trls_loss_and_says_so(change, monkeypatch):
    if change == "another argument":

        class Changed:
            @staticmethod
            def forward(ctx, hidden, weight, targets):
                pass

        monkeypatch.setattr(utils, "_ChunkedLogProbFunction", Changed)
    else:
        monkeypatch.delattr(utils, "_ChunkedLogProbFunction" if change == "no function" else "add_fused_lm_head")
    assert patches.find_fused_head_problem()
    monkeypatch.setattr(cpu_loss, "AVAILABLE", not patches.find_fused_head_problem())
    monkeypatch.setattr(trl, "__version__", "1.99.0")
    assert not cpu_loss.install(tiny(), 1.0)
    line = "TRL's own; the faster CPU loss does not fit TRL 1.99.0"
    assert cpu_loss.describe_mismatch(torch.device("cpu")) == line
    assert cpu_loss.describe_mismatch(torch.device("cuda")) == ""
    monkeypatch.setattr(trl, "__version__", "1.8.0")  # has no fused head, and is no news
    assert cpu_loss.describe_mismatch(torch.device("cpu")) == ""


@needs_fused_head
def test_run_says_that_the_faster_loss_does_not_fit(go, monkeypatch):
    monkeypatch.setattr(cpu_loss, "AVAILABLE", False)
    code, out, err = go()
    assert code == 0, err
    assert f"loss         TRL's own; the faster CPU loss does not fit TRL {trl.__version__}" in out


@needs_fused_head
def test_head_with_triton_is_imitated_and_is_back_afterwards():
    kernels = importlib.import_module(utils._ChunkedLogProbFunction.__module__)
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    before = utils._use_triton, [getattr(kernels, name) for name in names]
    with patches.imitate_triton_head():
        assert utils._use_triton(torch.device("cpu"))
        assert [getattr(kernels, name) for name in names] != before[1]
    assert (utils._use_triton, [getattr(kernels, name) for name in names]) == before


# transformers, torch


def tiny(**text):
    """Return a model of one layer."""
    config = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(AutoConfig.for_model("llama", **config | text))


def test_configuration_keeps_the_name_of_the_attention():
    model = AutoModelForCausalLM.from_pretrained(paths.EMBEDDED / "tiny", attn_implementation="eager")
    assert patches.get_attention_name(model.config.get_text_config()) == "eager"
    model.set_attn_implementation("sdpa")
    assert patches.get_attention_name(model.config.get_text_config()) == "sdpa"
    assert patches.get_attention_name(AutoConfig.from_pretrained(paths.EMBEDDED / "tiny")) is None


def test_class_is_built_from_its_configuration_with_a_dtype():
    model = patches.build_from_config(LlamaForCausalLM, tiny().config, dtype=torch.bfloat16)
    assert type(model) is LlamaForCausalLM
    assert model.dtype == torch.bfloat16


def test_model_class_lists_what_it_keeps_in_float32():
    assert {"_keep_in_fp32_modules", "_keep_in_fp32_modules_strict"} <= set(vars(PreTrainedModel))
    model = tiny()
    model._keep_in_fp32_modules, model._keep_in_fp32_modules_strict = {"gate"}, {"norm"}
    assert sorted(patches.list_float32_modules(model)) == ["gate", "norm"]


def test_compiled_model_is_unwrapped():
    module = torch.nn.Linear(1, 1)
    assert patches.unwrap_compiled(torch.compile(module, backend="eager")) is module
    assert patches.unwrap_compiled(module) is module


PARAMETERS = {  # functions that upstream does not document, with the parameters that we rely on
    "transformers.masking_utils.sdpa_mask": ("attention_mask", "allow_is_causal_skip", "use_vmap", "device"),
    "transformers.integrations.sdpa_attention.sdpa_attention_forward": (
        *("module", "query", "key", "value", "attention_mask"),
        *("dropout", "scaling"),
    ),
    "transformers.PreTrainedModel.get_correct_attn_implementation": ("self", "requested_attention"),
    "transformers.quantizers.quantizers_utils.should_convert_module": ("full_name", "patterns"),
    "transformers.trainer_pt_utils.get_length_grouped_indices": ("lengths", "batch_size"),
    "transformers.utils.chat_template_utils.render_jinja_template": ("conversations", "tools", "chat_template"),
    "peft.utils.other.get_pattern_key": ("pattern_keys", "key_to_match"),
    "trl.trainer.utils.create_model_from_path": ("model_id",),
    "trl.chat_template_utils.has_generation_markers": ("chat_template",),
}


@pytest.mark.parametrize("path", PARAMETERS)
def test_undocumented_function_takes_what_we_hand_to_it(path):
    module, _, name = path.rpartition(".")
    owner = PreTrainedModel if module.endswith("PreTrainedModel") else importlib.import_module(module)
    assert set(PARAMETERS[path]) <= set(inspect.signature(getattr(owner, name)).parameters)


def test_attention_gets_the_borders_of_documents_and_the_mask_says_that_rows_are_packed(monkeypatch):
    """Without one of these names packed rows would attend over the whole batch: right, and several times as slow."""
    seen = {}

    def make_mask(*args, **kwargs):
        seen["mask"] = set(kwargs)
        return real_mask(*args, **kwargs)

    def attend(*args, **kwargs):
        seen["attention"] = set(kwargs)
        return real_attention(*args, **kwargs)

    real_mask, real_attention = packed_attention.make_mask, packed_attention.attend
    monkeypatch.setattr(packed_attention, "make_mask", make_mask)
    monkeypatch.setattr(packed_attention, "attend", attend)
    model = tiny()
    assert packed_attention.install(model)
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    borders = torch.tensor([0, 3, 5], dtype=torch.int32)
    ids = positions + 2
    model(input_ids=ids, position_ids=positions, cu_seq_lens_q=borders, cu_seq_lens_k=borders, use_cache=False)
    assert {"attention_mask", "allow_is_causal_skip"} <= seen["mask"]
    assert {"cu_seq_lens_q", "position_ids", "dropout", "scaling"} <= seen["attention"]


# bitsandbytes, peft


def test_switch_of_the_4bit_cpu_kernel_is_where_the_repair_sets_it():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    layer = bitsandbytes.nn.Linear4bit(64, 64)
    layer.support_avx512bf16_for_cpu = True
    assert "support_avx512bf16_for_cpu" in inspect.getsource(type(layer))
    patches.keep_backward_of_4bit_weights(torch.nn.Sequential(layer))
    assert layer.support_avx512bf16_for_cpu is False


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(64, 144), (3, 144), (7, 16), (64, 128), (5, 66)])
def test_four_bit_rows_that_no_block_divides_are_dequantized_rightly(shape, kind, monkeypatch):
    functional = pytest.importorskip("bitsandbytes").functional
    kernels = sys.modules["bitsandbytes.backends.cpu.ops"]
    library = kernels.lib._library if isinstance(kernels.lib, patches._RowsOfOneBlock) else kernels.lib
    monkeypatch.setattr(kernels, "lib", library)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=kind)
    halves = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).flatten()[: weight.numel()].long()
    expected = (state.code[halves] * state.absmax.repeat_interleave(64)[: weight.numel()]).view(shape)
    if shape == (64, 144) and torch.cpu._is_avx512_supported():
        unrepaired = functional.dequantize_4bit(packed, state)
        assert not torch.equal(unrepaired, expected), (
            "bitsandbytes is repaired: remove patches.dequantize_rows_of_any_length"
        )
    patches.dequantize_rows_of_any_length()
    patches.dequantize_rows_of_any_length()
    assert kernels.lib._library is library, "it is replaced once"
    assert torch.equal(functional.dequantize_4bit(packed, state), expected)


def test_loading_an_adapter_takes_its_type_and_saving_one_takes_the_embeddings():
    assert "autocast_adapter_dtype" in inspect.signature(PeftModel.load_adapter).parameters
    assert "save_embedding_layers" in inspect.signature(PeftModel.save_pretrained).parameters


def test_wrapper_of_trained_rows_still_lacks_the_bias_of_its_head():
    model = get_peft_model(tiny(), LoraConfig(task_type="CAUSAL_LM", trainable_token_indices={"lm_head": [3]}))
    head = model.get_output_embeddings()
    assert type(head).__name__ == "TrainableTokensWrapper"
    assert not hasattr(head, "bias"), "peft is repaired: remove patches.complete_head_of_trained_rows"
    patches.repair(model)
    assert head.bias is None
    assert model.save_pretrained.keywords == {"save_embedding_layers": False}


# datasets, tokenizers


def test_fingerprint_of_rows_is_read_and_is_the_one_they_are_made_with():
    rows, others = (Dataset.from_dict({"text": [letter]}) for letter in "ab")
    assert code_digest.get_fingerprint(rows) != code_digest.get_fingerprint(others)
    rows = Dataset(rows.data, fingerprint="key")
    assert code_digest.get_fingerprint(rows) == "key"
    derived = [code_digest.get_fingerprint(rows.select([0])) for _ in range(2)]
    assert derived[0] == derived[1] != "key"  # what follows has a key of its own, found again


def test_backend_of_a_tokenizer_and_its_extra_tokens_can_be_replaced(here):
    tokenizer = AutoTokenizer.from_pretrained(models.base(here / "base"))
    changed = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    changed.add_tokens(["<another>"])
    tokenizer._tokenizer = changed
    assert "<another>" in tokenizer.get_vocab()
    tokenizer._extra_special_tokens = ["<another>"]
    assert [str(token) for token in tokenizer.extra_special_tokens] == ["<another>"]
