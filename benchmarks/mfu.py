"""What a step of `gpu.py` computes: the model, its rows, their arithmetic, and what cards can do at most.

Arithmetic as in PaLM's appendix B (https://arxiv.org/abs/2204.02311): a token takes 6 FLOPs for each weight that it is
multiplied with (2 forward, 2 for the gradient of what goes in, 2 for that of the weight: frozen weights take 4), and
attention 12 for each layer, width and token that it sees, of which causality leaves half. Documents alone count: no
padding, no adapter (about 2%), and not what checkpointing computes again.
"""

SHAPE = {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24, "num_attention_heads": 14}
SHAPE |= {"num_key_value_heads": 2, "vocab_size": 151_936, "tie_word_embeddings": True}  # Qwen2.5-0.5B's config.json
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 512, "tie_word_embeddings": True}
# Dense bfloat16 TFLOPS of the data sheets (https://www.nvidia.com/en-us/data-center/), where those print figures
# with sparsity half of them; the first name that the card's name holds.
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


def build(folder, options):
    """Write the model, random but the same for all sides, and a tokenizer that nothing needs but SFTTrainer."""
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    with torch.device(options.device):
        model = Qwen2ForCausalLM(Qwen2Config(**options.shape, max_position_embeddings=32_768))
    model.save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"a": 0, "e": 1}))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="e", pad_token="e").save_pretrained(folder)


def data(options):
    """Return (packs, documents) as rows with the same tokens in the same order; lengths are drawn."""
    import numpy as np

    draw = np.random.default_rng(0)
    packs = {"input_ids": [], "labels": [], "seq_lengths": []}
    apart = {"input_ids": [], "labels": []}
    for _ in range(options.packs * options.steps):
        cuts = np.sort(draw.choice(np.arange(1, options.length // 16), DOCUMENTS - 1, replace=False)) * 16
        ids = draw.integers(5, options.shape["vocab_size"], options.length)
        whole = []
        for part in np.split(ids, cuts):
            labels = part.tolist()
            labels[0] = -100  # nothing comes before it in its document
            apart["input_ids"].append(part.tolist())
            apart["labels"].append(labels)
            whole += labels
        lengths = np.diff([0, *cuts, options.length]).tolist()
        for name, value in (("input_ids", ids.tolist()), ("labels", whole), ("seq_lengths", lengths)):
            packs[name].append(value)
    return packs, apart


def flops(options, frozen):
    """Return the FLOPs of a step, as said above."""
    shape = options.shape
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    keys = width * shape["num_key_value_heads"] // shape["num_attention_heads"]
    layer = 2 * width * (width + keys) + 3 * width * shape["intermediate_size"]  # q, o; k, v; gate, up, down
    weights = layers * layer + shape["vocab_size"] * width  # the embedding multiplies nothing, as the head it does
    packs, _ = data(options)
    lengths = [length for pack in packs["seq_lengths"] for length in pack]
    tokens, seen = sum(lengths), sum(length**2 for length in lengths)
    return ((4 if frozen else 6) * weights * tokens + 6 * layers * width * seen) / options.steps
