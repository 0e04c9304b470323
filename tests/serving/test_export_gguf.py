"""GGUF files: llama.cpp and transformers compute what the trained model does, with its tokens."""

import dataclasses
import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import gguf
import pytest
import torch
import transformers
from conftest import SHIPPED
from tokenizers import Tokenizer, models, normalizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_sft.errors import RecipeError, TemplateError
from trl_sft.recipe import paths
from trl_sft.serving import base_tensors
from trl_sft.serving.export import gguf_file, gguf_vocabulary, pre_tokenizers
from trl_sft.serving.proof import llama_server

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "pad_token_id": 0}
SIZES |= {"bos_token_id": None, "eos_token_id": 2, "vocab_size": 512}
ROPE = {"rope_theta": 10000.0, "factor": 4.0}
TOYS = {
    "Llama": ("Llama", {}),
    "Llama, tied, wide heads": ("Llama", {"tie_word_embeddings": True, "head_dim": 32}),
    "Llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "Llama, llama3 rope": (
        "Llama",
        {"rope_parameters": ROPE | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}}
        | {"max_position_embeddings": 256},
    ),
    "Llama, linear rope": ("Llama", {"rope_parameters": ROPE | {"rope_type": "linear"}}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, yarn rope": (
        "Qwen2",
        {"rope_parameters": ROPE | {"rope_type": "yarn", "original_max_position_embeddings": 64}},
    ),
    "Qwen3": ("Qwen3", {}),
    "Gemma": ("Gemma", {"num_key_value_heads": 1}),
    "Gemma2": ("Gemma2", {"query_pre_attn_scalar": 16, "sliding_window": 16}),
    "Gemma3": ("Gemma3", {"query_pre_attn_scalar": 16, "sliding_window": 16, "num_hidden_layers": 6}),
    "Phi": ("Phi", {"partial_rotary_factor": 0.5, "num_key_value_heads": 4}),
    "Phi3": ("Phi3", {"sliding_window": None}),
}
TOYS["Llama, llama3 rope"][1]["rope_parameters"]["original_max_position_embeddings"] = 64
# nats; measured: f32 up to 1e-5, f16 up to 1e-5, q8_0 up to 5e-3. llama.cpp rounds inside attention
KL = {"f32": 5e-5, "f16": 1e-4, "q8_0": 2e-2}
CRAB = pre_tokenizers.ComparedTexts(["crab"], [])
IDS = torch.randint(5, 500, (40,), generator=torch.Generator().manual_seed(3)).tolist()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(paths.EMBEDDED / "tiny")


def build_toy(folder, name, values):
    """Write an untrained model whose weights are large enough that each of them matters; return its folder."""
    config = getattr(transformers, f"{name}{'TextConfig' if name == 'Gemma3' else 'Config'}")(**(SIZES | values))
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            else:
                parameter.mul_(8)
    model.save_pretrained(folder)
    return folder


def write(folder, path, tokenizer, file_type="f32"):
    """Write the GGUF file of a toy; return its plan."""
    planned = gguf_file.plan(folder, base_tensors.load_on_meta(folder), file_type, where="the model")
    vocabulary = gguf_vocabulary.build(tokenizer, planned.config.vocab_size, [2], adds_bos=False, where="the model")
    gguf_file.write(planned, dataclasses.replace(vocabulary, pre="llama-bpe"), path, metadata={"general.name": "toy"})
    return planned


class Llama:
    """llama.cpp with a file, in a child process."""

    def __init__(self, path):
        command = [sys.executable, "-I", llama_server.__file__, json.dumps(sys.path), str(path), "256", "1"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.address = self.process.stdout.readline().strip()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.communicate()

    def post(self, path, **body):
        request = urllib.request.Request(
            self.address + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def read_log_probs(self, ids):
        """Return the log-probabilities of the token that follows: (vocabulary,)."""
        # the bias changes which token is sampled, and not the probabilities: an unfinished character has none
        answer = self.post("/completion", prompt=ids, n_predict=1, n_probs=512, logit_bias=[[70, 1000.0]])
        probabilities = answer["completion_probabilities"][0]["top_logprobs"]
        assert len(probabilities) == 512
        log_probs = torch.empty(512)
        for entry in probabilities:
            log_probs[entry["id"]] = entry["logprob"]
        return log_probs


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("toy", TOYS)
def test_llama_cpp_computes_the_distribution_of_the_model(toy, tokenizer, tmp_path):
    folder = build_toy(tmp_path / "model", *TOYS[toy])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([IDS])).logits[0].log_softmax(-1)
    assert float(expected.exp().max()) > 0.05  # the weights matter: the distribution is far from uniform
    types = KL if toy in ("Llama", "Gemma3") else ["f32", "f16"]
    for file_type in types:
        planned = write(folder, tmp_path / f"{file_type}.gguf", tokenizer, file_type)
        with Llama(tmp_path / f"{file_type}.gguf") as llama:
            log_probs = {length: llama.read_log_probs(IDS[:length]) for length in (1, 17, 40)}
        for length, ours in log_probs.items():
            reference = expected[length - 1]
            kl = float((reference.exp() * (reference - ours)).sum())
            assert kl < KL[file_type], (file_type, length, kl)
        assert file_type == "f32" or file_type.upper() in planned.count_types()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("toy", ["Llama", "Mistral", "Qwen2", "Phi3"])
def test_transformers_reads_the_weights_back(toy, tokenizer, tmp_path):
    folder = build_toy(tmp_path / "model", *TOYS[toy])
    write(folder, tmp_path / "toy.gguf", tokenizer)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    restored = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="toy.gguf", dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(restored.state_dict()[name], tensor, rtol=0, atol=0)


def test_file_is_as_large_as_planned_and_has_no_second_head(tokenizer, tmp_path):
    folder = paths.EMBEDDED / "tiny"
    planned = write(folder, tmp_path / "tiny.gguf", tokenizer, "f16")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    assert sum(int(tensor.n_bytes) for tensor in reader.tensors) == planned.size
    assert int(reader.fields["llama.context_length"].parts[-1][0]) == 1024


@pytest.mark.parametrize(
    ("name", "values", "words"),
    [
        ("Bloom", {"n_head": 4, "n_layer": 2}, "BloomForCausalLM cannot be written"),
        ("Llama", {"hidden_act": "gelu"}, "`hidden_act: gelu`"),
        ("Llama", {"rope_parameters": ROPE | {"rope_type": "dynamic"}}, "`rope_type: dynamic`"),
        ("Gemma2", {"query_pre_attn_scalar": 99}, "`query_pre_attn_scalar` is 99"),
        ("Gemma3", {"query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2}, "`layer_types`"),
        ("Phi", {"qk_layernorm": True, "num_key_value_heads": 4}, "`qk_layernorm: true`"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_model_that_llama_cpp_does_not_compute_is_refused_by_name(name, values, words, tmp_path):
    folder = build_toy(tmp_path / "model", name, values)
    with pytest.raises(RecipeError, match=words.replace("(", "\\(")):
        gguf_file.plan(folder, base_tensors.load_on_meta(folder), "f32", where="the model")


def test_rows_that_no_block_divides_refuse_a_quantized_type(tmp_path):
    folder = build_toy(tmp_path / "model", "Llama", {"hidden_size": 48, "head_dim": 12, "intermediate_size": 80})
    with pytest.raises(RecipeError, match="no weight can be written as q8_0"):
        gguf_file.plan(folder, base_tensors.load_on_meta(folder), "q8_0", where="the model")


def test_window_of_an_architecture_without_windows_limits_the_context(tokenizer, tmp_path):
    folder = build_toy(tmp_path / "model", "Mistral", {"sliding_window": 32})
    assert write(folder, tmp_path / "toy.gguf", tokenizer).parameters["context_length"] == 32


def test_tokens_of_the_embedded_model_are_those_of_llama_cpp():
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tiny")
    vocabulary = gguf_vocabulary.build(tokenizer, 512, [2], adds_bos=False, where="the model")
    prompt = "<|im_start|>user\nWhat is 2 plus 2?<|im_end|>\n<|im_start|>assistant\n"
    texts = pre_tokenizers.ComparedTexts([prompt], ["请写出eup的最后一个字母。"])
    chosen, name, comparison = pre_tokenizers.choose(vocabulary, tokenizer, texts, name="tiny", where="the model")
    assert chosen.pre in pre_tokenizers.BYTE_LEVEL_RULES
    assert name == "tiny"
    assert (comparison.prompts, comparison.plain_texts) == (1, 1 + len(pre_tokenizers.PROBES))
    assert comparison.plain_differences == comparison.random_differences == 0


def test_tokenizer_that_normalizes_is_compared_on_normal_texts(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(tmp_path)
    assert tokenizer("e\u0301")["input_ids"] == tokenizer("é")["input_ids"]
    vocabulary = gguf_vocabulary.build(tokenizer, 512, [2], adds_bos=False, where="the model")
    chosen, _, comparison = pre_tokenizers.choose(vocabulary, tokenizer, CRAB, name="toy", where="the model")
    assert comparison.is_normalized
    assert comparison.plain_differences == 0
    assert chosen.normalizes


def test_tokenizer_whose_rules_llama_cpp_does_not_have_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(pre_tokenizers, "BYTE_LEVEL_RULES", ("llama-bpe", "qwen2", "gpt-2"))
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "tiny")  # its rules part all letters
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["merges"].append(["a", "b"])
    content["model"]["vocab"]["ab"] = 512
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert 512 not in tokenizer("crab")["input_ids"]
    vocabulary = gguf_vocabulary.build(tokenizer, 513, [2], adds_bos=False, where="the model")
    with pytest.raises(TemplateError, match=r"no rules of llama\.cpp .*: 'c\|r\|a\|b' there, 'c\|r\|ab' in llama\.cpp"):
        pre_tokenizers.choose(vocabulary, tokenizer, CRAB, name="x", where="the model")


def build_sentencepiece(folder, scheme):
    """Return a tokenizer of the kind of SentencePiece: BPE with fallback to bytes, spaces as a letter."""
    model = models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    trained = Tokenizer(model)
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    corpus = Path(__file__).read_text(encoding="utf-8").splitlines()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, show_progress=False)
    trained.train_from_iterator(corpus, trainer)
    content = json.loads(trained.to_str())
    words = sorted(content["model"]["vocab"], key=content["model"]["vocab"].get)[len(special) :]
    names = [*special, *(f"<0x{number:02X}>" for number in range(256)), *words]
    content["model"]["vocab"] = {name: number for number, name in enumerate(names)}
    if scheme == "first":
        content["normalizer"] = None
        content["pre_tokenizer"] = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    elif scheme == "none":
        content["normalizer"] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    return tokenizer


@pytest.mark.parametrize(
    ("scheme", "adds_space", "differs"), [("prepend", True, False), ("none", False, False), ("first", False, True)]
)
def test_sentencepiece_tokens_are_those_of_llama_cpp(scheme, adds_space, differs, tmp_path):
    tokenizer = build_sentencepiece(tmp_path, scheme)
    vocabulary = gguf_vocabulary.build(tokenizer, len(tokenizer) + 3, [2], adds_bos=True, where="the model")
    texts = pre_tokenizers.ComparedTexts([f"<s><|user|>\n{text}</s>" for text in pre_tokenizers.PROBES], [])
    chosen, _, comparison = pre_tokenizers.choose(vocabulary, tokenizer, texts, name="toy", where="the model")
    assert (chosen.kind, chosen.adds_space, comparison.rules) == ("llama", adds_space, "")
    assert (comparison.plain_differences > 0) is differs  # llama.cpp has no rule for "first"; prompts are equal
    assert chosen.types[:4] == (2, 3, 3, 6)  # unknown, control, control, byte
    assert chosen.tokens[-3:] == tuple(f"[PAD{len(tokenizer) + number}]" for number in range(3))
