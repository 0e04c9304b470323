"""Builds the toy data and model of the tests from a seed: the rows `phrases` and the untrained model `tiny`.

    python tests/build_toy.py [FOLDER]      (default: tests/toy)

Rows: phrases of an adjective and a noun, translated from English into Chinese and back. The held-out rows have pairs
that occur in no training row, so a correct answer shows that the model learned the words and not the rows. Model: a
Llama of two layers with random weights, and a byte-level BPE tokenizer trained on the rows.
"""

import json
import random
import sys
from pathlib import Path

SEED = 0
VOCABULARY, HIDDEN, LAYERS, HEADS, POSITIONS = 512, 64, 2, 4, 1024
HELD_OUT_PAIRS = 100

ADJECTIVES = dict(
    zip(
        "red blue green black white big small old new fast slow quiet loud warm cold happy sad clever brave kind "
        "long short clean dirty heavy light soft hard sweet strange".split(),
        "红 蓝 绿 黑 白 大 小 旧 新 快 慢 安静 吵闹 温暖 冰冷 快乐 悲伤 聪明 勇敢 善良 "
        "长 短 干净 肮脏 沉重 轻便 柔软 坚硬 甜 奇怪".split(),
        strict=True,
    )
)
NOUNS = dict(
    zip(
        "cat dog horse bird fish cow sheep rabbit tiger bear house door window table chair bed lamp cup plate knife "
        "tree flower river mountain road bridge boat train car bicycle teacher doctor student farmer cook child king "
        "friend book letter".split(),
        "猫 狗 马 鸟 鱼 牛 羊 兔子 老虎 熊 房子 门 窗户 桌子 椅子 床 灯 杯子 盘子 刀 "
        "树 花 河 山 路 桥 船 火车 汽车 自行车 老师 医生 学生 农民 厨师 孩子 国王 朋友 书 信".split(),
        strict=True,
    )
)
# ChatML with `generation` markers, from which transformers computes the mask of the assistant's tokens
TEMPLATE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' }}
    {%- if message['role'] == 'assistant' %}
        {%- generation %}{{- message['content'] + '<|im_end|>' }}{%- endgeneration %}
    {%- else %}
        {{- message['content'] + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training and held-out rows; both directions of a pair are in the same split."""
    pairs = [(a, n) for a in ADJECTIVES for n in NOUNS]
    random.Random(SEED).shuffle(pairs)
    splits = []
    for part in (pairs[HELD_OUT_PAIRS:], pairs[:HELD_OUT_PAIRS]):
        split = []
        for adjective, noun in part:
            english, chinese = f"the {adjective} {noun}", f"{ADJECTIVES[adjective]}的{NOUNS[noun]}"
            split.append({"question": f"Translate into Chinese: {english}", "answer": chinese})
            split.append({"question": f"翻译成英文：{chinese}", "answer": english})
        splits.append(split)
    return splits[0], splits[1]


def build(folder: Path) -> None:
    """Write rows and model into a folder; the bytes are equal on every call with the same library versions."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    train, test = rows()
    (folder / "phrases").mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("test", test)):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
        (folder / "phrases" / f"{name}.jsonl").write_text(text, encoding="utf-8")

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in train for text in row.values()), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=POSITIONS,
        chat_template=TEMPLATE,
    )
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=3 * HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    torch.manual_seed(SEED)
    LlamaForCausalLM(config).save_pretrained(folder / "tiny")
    fast.save_pretrained(folder / "tiny")


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "toy")
