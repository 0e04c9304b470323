"""Positions of a model: a table has an end, rotary positions were trained up to a length, ALiBi has neither."""

import pytest
import torch
import transformers
from conftest import jsonl

from trl_sft.errors import Edit
from trl_sft.model import positions
from trl_sft.recipe import paths

TABLES = {
    "GPT2Config": {"n_positions": 64},
    "OPTConfig": {
        "max_position_embeddings": 64,
        "hidden_size": 64,
        "word_embed_proj_dim": 64,
        "num_attention_heads": 4,
    },
    "GPTJConfig": {"n_positions": 64, "n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "GPTNeoConfig": {"max_position_embeddings": 64, "attention_types": [[["global"], 1]]},
    "CTRLConfig": {"n_positions": 64},
    "CodeGenConfig": {"n_positions": 64, "n_embd": 64, "n_head": 4, "rotary_dim": 8},
    "BioGptConfig": {"max_position_embeddings": 64},
    "GPTBigCodeConfig": {"n_positions": 64},
    "OpenAIGPTConfig": {"n_positions": 64},
    "BertConfig": {"max_position_embeddings": 64, "is_decoder": True},
    "RobertaConfig": {"max_position_embeddings": 66, "is_decoder": True},
}
WITHOUT_TABLE = {
    "LlamaConfig": {"max_position_embeddings": 64},
    "Qwen2Config": {"max_position_embeddings": 64},
    "GPTNeoXConfig": {"max_position_embeddings": 64},
    "PhiConfig": {"max_position_embeddings": 64},
    "FalconConfig": {"max_position_embeddings": 64},
    "XGLMConfig": {"max_position_embeddings": 64},
}
SMALL = {"num_hidden_layers": 1, "vocab_size": 99}


def build(name, keywords):
    config = getattr(transformers, name)(**SMALL | keywords)
    with torch.device("meta"):
        return config, transformers.AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", TABLES)
def test_table_of_positions_is_found_in_the_modules(name):
    config, model = build(name, TABLES[name])
    assert positions.find_table(model, positions.read_limit(config)) == 64


@pytest.mark.parametrize("name", WITHOUT_TABLE)
def test_computed_positions_are_no_table(name):
    config, model = build(name, WITHOUT_TABLE[name])
    assert positions.read_limit(config) == 64
    assert positions.find_table(model, 64) is None


@pytest.mark.parametrize("name", ["BloomConfig", "MambaConfig"])
def test_models_without_positions_have_no_limit(name):
    assert positions.read_limit(getattr(transformers, name)()) is None


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8}, 64),
        ({"rope_type": "default"}, 64),
    ],
)
def test_scaled_rotary_positions_reach_farther(scaling, expected):
    extra = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if scaling["rope_type"] == "llama3" else {}
    rope = {"rope_theta": 10000.0, **scaling, **extra}
    config = transformers.LlamaConfig(max_position_embeddings=64, rope_parameters=rope)
    assert positions.read_limit(config) == expected


@pytest.fixture
def gpt2(here):
    """Write a GPT-2 with 64 positions and the toy tokenizer to ./gpt2."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=48, n_layer=1, n_head=4, bos_token_id=None, eos_token_id=2
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(here / "gpt2")
    tokenizer.save_pretrained(here / "gpt2")


def chat(number):
    return {"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "w " * number}]}


TEXT = (
    "model: {name_or_path: ./gpt2}\ndata: {train: r.jsonl}\n"
    "train: {output_dir: out, max_steps: 1, per_device_train_batch_size: 2, logging_steps: 1}\n"
)


@pytest.mark.usefixtures("gpt2")
def test_rows_without_a_position_are_refused_with_the_length_and_trained_with_it(here, go):
    jsonl(here / "r.jsonl", [chat(3), chat(80), chat(5), chat(90)])
    for command in (["check"], ["prepare"], []):
        code, out, err = go(TEXT, command=command)
        assert code == 2, out
        assert "recipe.yaml:3 train.max_length" in err or "recipe.yaml" in err
        assert "GPT2LMHeadModel knows 64 positions, but 2 rows of train are longer; the first is r.jsonl row 2" in err
        assert "Set train.max_length: 64" in err
    code, out, err = go(TEXT, "train.max_length=64")
    assert code == 0, err
    assert (
        go(TEXT, "train.max_length=64", "data.overlong=drop", "train.output_dir=o2", "data.max_untrained=0.9")[0] == 0
    )


@pytest.mark.usefixtures("gpt2")
def test_rows_of_an_evaluation_set_and_packs_need_positions_too(here, go):
    jsonl(here / "r.jsonl", [chat(3), chat(5)])
    jsonl(here / "e.jsonl", [chat(80)])
    code, _, err = go(TEXT.replace("r.jsonl}", "r.jsonl, eval: e.jsonl}"), command=["check"])
    assert code == 2
    assert "1 row of eval is longer; the first is e.jsonl row 1" in err
    code, _, err = go(TEXT, "train.packing=true", command=["check"])
    assert code == 0, "packs of short rows count positions from 0 in each row: " + err


@pytest.mark.usefixtures("gpt2")
def test_stream_needs_a_length_where_positions_end(here, go):
    jsonl(here / "r.jsonl", [chat(3)] * 40)
    text = TEXT.replace("r.jsonl}", "{path: r.jsonl, streaming: true}}")
    code, _, err = go(text, command=["check"])
    assert code == 2
    assert "rows of the stream may be longer" in err
    assert go(text, "train.max_length=64", command=["check"])[0] == 0


@pytest.mark.usefixtures("gpt2")
def test_answers_of_the_evaluation_end_with_the_positions(here, go):
    question = [{"role": "user", "content": "ab " * 12}]
    rows = [{"messages": [*question, {"role": "assistant", "content": f"{'w ' * 9}{n}"}]} for n in range(20)]
    jsonl(here / "r.jsonl", rows)
    text = TEXT.replace("r.jsonl}", "r.jsonl, eval_fraction: 0.4}") + "evaluate: {generation: {max_new_tokens: 50}}\n"
    code, _, err = go(text, "train.max_length=64")
    assert code == 0, err
    samples = (here / "out" / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 8


def test_rows_longer_than_rotary_positions_are_a_line(here, go):
    jsonl(here / "r.jsonl", [chat(3), chat(2000), chat(5)])
    text = TEXT.replace("./gpt2", "trl_sft:tiny")
    code, out, err = go(text, "train.max_length=4096", command=["check"])
    assert code == 0, err
    limit = transformers.AutoConfig.from_pretrained(paths.EMBEDDED / "tiny").max_position_embeddings
    assert f"1 row of train is longer than the {limit:,} positions that the model was trained on" in out
    assert "the first is r.jsonl row 2" in out
    code, out, _ = go(text, command=["check"])
    assert "positions" not in out, "TRL's default max_length cuts the row"


@pytest.mark.usefixtures("gpt2")
def test_fault_carries_the_length_for_programs(here):
    from trl_sft import load_recipe
    from trl_sft.errors import DataError
    from trl_sft.training import stages

    jsonl(here / "r.jsonl", [chat(80)])
    (here / "recipe.yaml").write_text(TEXT)
    with pytest.raises(DataError) as error:
        stages.prepare(load_recipe("recipe.yaml"))
    (fault,) = error.value.faults
    assert fault.code == "model.too_few_positions"
    assert fault.edits == (Edit("set", ("train", "max_length"), 64),)
