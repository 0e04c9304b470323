"""The model and the rows of `gpu.py`, the FLOPs of a step, and the peak FLOPS of the cards.

FLOPs are counted as in PaLM's appendix B (https://arxiv.org/abs/2204.02311). A token takes 6 FLOPs for each weight that
multiplies it (2 forward, 2 for the gradient of the input, 2 for the gradient of the weight; frozen weights take 4).
Attention takes 12 for each layer, each dimension and each token that a token sees; causality leaves half of them.
Documents alone count: no padding, no adapter (about 2%), and nothing that gradient checkpointing computes twice.
"""

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}  # Qwen2.5-0.5B's config.json
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}
# Dense bfloat16 TFLOPS of the data sheets (https://www.nvidia.com/en-us/data-center/); where a sheet gives figures with
# sparsity, half of them. The first name that is part of the card's name counts.
PEAKS = {
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
}
PEAKS |= {"L40": 181, "L4": 121, "A10": 125, "RTX 4090": 165}
DOCUMENTS = 4  # in a pack


def build_model(folder, options):
    """Write the random model that all sides share, and a tokenizer that only SFTTrainer needs."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen2ForCausalLM(Qwen2Config(**options.shape, max_position_embeddings=32_768))
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "e": 1}))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="e", pad_token="e").save_pretrained(folder)


def build_rows(options):
    """Return packs, and their documents as rows: the same tokens in the same order; lengths are random."""
    import numpy as np

    rng = np.random.default_rng(0)
    packs = {"input_ids": [], "labels": [], "seq_lengths": []}
    documents = {"input_ids": [], "labels": []}
    for _ in range(options.packs * options.steps):
        cuts = np.sort(rng.choice(np.arange(1, options.length // 16), DOCUMENTS - 1, replace=False)) * 16
        ids = rng.integers(5, options.shape["vocab_size"], options.length)
        pack_labels = []
        for part in np.split(ids, cuts):
            labels = part.tolist()
            labels[0] = -100  # nothing comes before it in its document
            documents["input_ids"].append(part.tolist())
            documents["labels"].append(labels)
            pack_labels += labels
        lengths = np.diff([0, *cuts, options.length]).tolist()
        for name, value in (("input_ids", ids.tolist()), ("labels", pack_labels), ("seq_lengths", lengths)):
            packs[name].append(value)
    return packs, documents


def count_flops(options, *, frozen):
    """Return the FLOPs of a step, counted as the module says."""
    shape = options.shape
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * width * (width + keys) + 3 * width * shape["intermediate_size"]  # q, o; k, v; gate, up, down
    weights = layers * layer + shape["vocab_size"] * width  # the embedding multiplies as the head only
    packs, _ = build_rows(options)
    lengths = [length for pack in packs["seq_lengths"] for length in pack]
    tokens, token_pairs = sum(lengths), sum(length**2 for length in lengths)
    return ((4 if frozen else 6) * weights * tokens + 6 * layers * width * token_pairs) / options.steps
