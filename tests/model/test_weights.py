"""Weight files that do not fit the model are refused before training, with the names of the tensors."""

import json
import shutil

import pytest
from conftest import RECIPE
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trl_sft.recipe import paths

LOCAL = RECIPE.replace("trl_sft:tiny", "./model")
ADAPTER = RECIPE.replace("trl_sft:tiny", "./adapter")
EMBEDDING = "model.embed_tokens.weight"
NORM = "model.norm.weight"


@pytest.fixture
def model(here):
    """Copy the toy model into the current folder; return the path of its weights."""
    shutil.copytree(paths.EMBEDDED / "tiny", here / "model")
    return here / "model/model.safetensors"


@pytest.fixture
def adapter(model, here):
    """Write an adapter of the toy model; return its folder."""
    base = AutoModelForCausalLM.from_pretrained(here / "model")
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)
    peft_model.peft_config["default"].base_model_name_or_path = str(here / "model")
    peft_model.save_pretrained(here / "adapter")
    return here / "adapter"


def change(file, **changes):
    """Rename, remove (None) or replace tensors of a safetensors file."""
    tensors = load_file(file)
    for name, value in changes.items():
        tensor = tensors.pop(name)
        if isinstance(value, str):
            tensors[value] = tensor
        elif value is not None:
            tensors[name] = value(tensor)
    save_file(tensors, file, {"format": "pt"})


def shorten(file, size):
    """Cut a file to `size` bytes from its beginning, or by so many from its end if negative."""
    file.write_bytes(file.read_bytes()[:size])


BROKEN = {
    "embedding_missing": (lambda f: change(f, **{EMBEDDING: None}), [EMBEDDING, "missing"]),
    "norm_missing": (lambda f: change(f, **{NORM: None}), [NORM, "missing"]),
    "renamed": (lambda f: change(f, **{NORM: "evil"}), [NORM, "missing", "evil", "not in the model"]),
    "other_shape": (
        lambda f: change(f, **{NORM: lambda t: t[:5].clone()}),
        ["model.norm.weight has the shape (5,) in its files and (64,) in the model"],
    ),
    "end_missing": (lambda f: shorten(f, -5), ["cannot be read"]),
    "half": (lambda f: shorten(f, f.stat().st_size // 2), ["cannot be read"]),
    "header_alone": (lambda f: shorten(f, 100), ["cannot be read"]),
    "empty": (lambda f: f.write_bytes(b""), ["cannot be read"]),
    "garbage": (lambda f: f.write_bytes(b"garbage" * 100), ["cannot be read"]),
    "whole_numbers": (lambda f: change(f, **{NORM: lambda t: t.long()}), [NORM, "is stored as whole numbers"]),
    "git_lfs_pointer": (lambda f: f.write_text("version https://git-lfs.github.com/spec/v1\n"), ["cannot be read"]),
    "no_file": (lambda f: f.unlink(), ["cannot be read", "model.safetensors"]),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_weights_are_refused_before_training(go, model, here, name):
    damage, words = BROKEN[name]
    damage(model)
    for command in ([], ["check"]):
        code, _, err = go(LOCAL, command=command)
        assert code == 2, err
        assert all(word in err for word in words), err
        assert "Traceback" not in err
    assert not (here / "out").exists()


def test_missing_shard_is_refused(go, model, here):
    tensors = load_file(model)
    first = dict(list(tensors.items())[:3])
    save_file(first, here / "model/model-00001-of-00002.safetensors", {"format": "pt"})
    index = {name: f"model-0000{1 if name in first else 2}-of-00002.safetensors" for name in tensors}
    (here / "model/model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    model.unlink()
    code, _, err = go(LOCAL)
    assert code == 2
    assert "cannot be read" in err


INDEXES = ["[]", "{}", '{"weight_map": null}', '{"weight_map": {}}', '{"weight_map": {"a": 5}}', "{", "[" * 100_000]


@pytest.mark.parametrize("text", INDEXES, ids=lambda text: text[:20])
def test_broken_index_of_shards_is_refused(model, here, text):
    from trl_sft import load_recipe
    from trl_sft.errors import RecipeError
    from trl_sft.training import stages

    (here / "model/model.safetensors.index.json").write_text(text)
    model.unlink()
    (here / "recipe.yaml").write_text(LOCAL)
    run = load_recipe("recipe.yaml")
    with pytest.raises(RecipeError, match=r"model\.safetensors\.index\.json"):
        stages.check_model(run, stages.find_model(run))


def test_weights_that_are_not_finite_are_refused_before_a_file_is_written(go, model, here):
    change(model, **{NORM: lambda t: t * float("nan")})
    code, _, err = go(LOCAL)
    assert code == 2, err
    assert f"1 tensor ({NORM}) is not finite" in err
    assert not (here / "out").exists()


def test_tensor_that_the_model_does_not_have_is_accepted_by_name(go, model, here):
    tensors = load_file(model)
    save_file(tensors | {"extra": tensors[NORM].clone()}, model, {"format": "pt"})
    code, _, err = go(LOCAL)
    assert code == 2
    assert "1 tensor (extra) is in its files" in err
    assert "run.allow: [unused_weights]" in err
    assert go(LOCAL, "run.allow=[unused_weights]")[0] == 0
    assert "extra" not in load_file(here / "out/model.safetensors")


def test_acceptance_of_extra_tensors_does_not_accept_missing_ones(go, model):
    change(model, **{NORM: None})
    assert go(LOCAL, "run.allow=[unused_weights]")[0] == 2


def test_whole_adapter_is_accepted(go, adapter):
    code, _, err = go(ADAPTER)
    assert code == 0, err


TENSOR = "base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"
BROKEN_ADAPTERS = {
    "missing": (lambda f: change(f, **{TENSOR: None}), "missing"),
    "renamed": (lambda f: change(f, **{TENSOR: "evil"}), "evil"),
    "end_missing": (lambda f: shorten(f, -5), "cannot be read"),
    "empty": (lambda f: f.write_bytes(b""), "cannot be read"),
    "whole_numbers": (lambda f: change(f, **{TENSOR: lambda t: t.int()}), "is stored as whole numbers"),
}


@pytest.mark.parametrize("name", BROKEN_ADAPTERS)
def test_broken_adapter_weights_are_refused_before_training(go, adapter, here, name):
    damage, word = BROKEN_ADAPTERS[name]
    damage(adapter / "adapter_model.safetensors")
    for command in ([], ["check"]):
        code, _, err = go(ADAPTER, command=command)
        assert code == 2, err
        assert word in err
        assert "Traceback" not in err
    assert not (here / "out").exists()


def config_with(folder, **values):
    """Return an adapter's configuration with other values, as JSON."""
    return json.dumps(json.loads((folder / "adapter_config.json").read_text()) | values)


CONFIGS = {
    "brace": lambda f: "{",
    "list": lambda f: "[]",
    "number": lambda f: "5",
    "null": lambda f: "null",
    "empty": lambda f: "",
    "not_utf8": lambda f: "\xff\xfe",
    "deep": lambda f: "[" * 100_000,
    "long_name": lambda f: config_with(f, base_model_name_or_path="x" * 5000),
    "long_path": lambda f: config_with(f, base_model_name_or_path="/" + "x" * 5000),
    "null_character": lambda f: config_with(f, base_model_name_or_path="/a\0b"),
    "name_of_another_type": lambda f: config_with(f, base_model_name_or_path=[1]),
    "no_name": lambda f: config_with(f, base_model_name_or_path=None),
    "unknown_type": lambda f: config_with(f, peft_type="ZZ"),
    "type_of_another_type": lambda f: config_with(f, peft_type=[]),
    "negative_rank": lambda f: config_with(f, r=-1),
    "other_rank": lambda f: config_with(f, r=8),
    "rank_as_text": lambda f: config_with(f, r="x"),
    "other_targets": lambda f: config_with(f, target_modules=["q_proj"]),
    "targets_nothing": lambda f: config_with(f, target_modules=["zz"]),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_broken_adapter_config_is_refused_without_a_traceback(go, adapter, name):
    text = CONFIGS[name](adapter)
    (adapter / "adapter_config.json").write_bytes(text.encode("latin-1"))
    code, _, err = go(ADAPTER, command=["check"])
    assert code == 2, err
    assert "Traceback" not in err
    assert len(err) < 3000


@pytest.mark.parametrize(
    "text", ["{", "[]", "5", "", "\xff\xfe", "[" * 100_000, '{"model_type": []}', '{"model_type": "zz"}']
)
def test_broken_model_config_is_refused_without_a_traceback(go, model, here, text):
    (here / "model/config.json").write_bytes(text.encode("latin-1"))
    code, _, err = go(LOCAL, command=["check"])
    assert code == 2, err
    assert "Traceback" not in err
