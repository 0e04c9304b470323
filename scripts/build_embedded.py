"""Builds what the package embeds, from a seed: the rows `skills` and the pretrained base model `tiny`.

    python scripts/build_embedded.py [FOLDER]      (default: trl_sft/embedded; a quarter of an hour on two cores)

Rows: questions in English and in Chinese about six of ten skills on words and numbers. The words and numbers of the
held-out rows occur in no training row of the same skill and language. Model: a Llama of four layers and 1.1 M
parameters with a tokenizer of 512 tokens (each Latin letter, digit and sign is a token, and so are frequent Chinese
words). `pretrain_tiny.yaml` pretrains it on text that this script writes: the skills as calls, `upper(abc)=ABC`, and as
statements, "The upper case of abc is ABC." No question of the rows occurs in this text. Fine-tuning on `skills` teaches
the model to follow the question, to write the answer only, and to stop.
"""

import hashlib
import json
import random
import shutil
import string
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

SEED = 0
VOCABULARY, HIDDEN, INNER, LAYERS, HEADS, POSITIONS = 512, 144, 400, 4, 4, 1024
LINES, TEXTS = 7, 30_000  # lines of a text of the pretraining, and texts
HELD_OUT = 20  # rows of each skill in each language

WORDS = dict(
    zip(
        "cat dog horse bird fish cow sheep tiger bear house door window table chair bed lamp cup knife tree flower "
        "river road bridge boat car teacher doctor king book letter sun moon star rain snow wind fire water milk "
        "bread rice tea "
        "egg apple hand eye ear foot head heart city shop school song game day night year friend".split(),
        "猫 狗 马 鸟 鱼 牛 羊 虎 熊 房子 门 窗 桌子 椅子 床 灯 杯子 刀 树 花 "
        "河 路 桥 船 车 老师 医生 国王 书 信 太阳 月亮 星星 雨 雪 风 火 水 牛奶 "
        "面包 米饭 茶 鸡蛋 苹果 手 眼睛 耳朵 脚 头 心 城市 商店 学校 歌 游戏 天 夜 年 朋友".split(),
        strict=True,
    )
)
ENGLISH = {chinese: english for english, chinese in WORDS.items()}
_PAIRS = (
    "hot-cold big-small old-new fast-slow loud-quiet happy-sad long-short clean-dirty heavy-light soft-hard "
    "sweet-bitter open-shut full-empty rich-poor strong-weak wet-dry near-far early-late up-down left-right high-low "
    "good-bad young-aged deep-shallow wide-narrow thick-thin sharp-blunt safe-risky calm-angry brave-afraid"
)
OPPOSITES = {a: b for pair in _PAIRS.split() for a, b in (pair.split("-"), pair.split("-")[::-1])}


def _word(draw: random.Random) -> str:
    return "".join(draw.choice(string.ascii_lowercase) for _ in range(draw.randint(3, 4)))


def _two(low: int, high: int) -> Callable[[random.Random], str]:
    return lambda draw: ",".join(str(draw.randint(low, high)) for _ in range(2))


# skill -> a function that draws an operand, and a function that returns the answer to it
SKILLS = {
    "upper": (_word, str.upper),
    "reverse": (_word, lambda word: word[::-1]),
    "last": (_word, lambda word: word[-1]),
    "double": (_word, lambda word: word + word),
    "add": (_two(0, 9), lambda pair: str(sum(map(int, pair.split(","))))),
    "next": (lambda draw: str(draw.randint(0, 98)), lambda number: str(int(number) + 1)),
    "larger": (_two(10, 99), lambda pair: str(max(map(int, pair.split(","))))),
    "chinese": (lambda draw: draw.choice(list(WORDS)), WORDS.__getitem__),
    "english": (lambda draw: draw.choice(list(ENGLISH)), ENGLISH.__getitem__),
    "opposite": (lambda draw: draw.choice(list(OPPOSITES)), OPPOSITES.__getitem__),
}
# the skills of the rows, with the largest number of training rows in each language; the rows have no other skill
TUNED = {"upper": 200, "last": 200, "reverse": 520, "double": 640, "next": 240, "english": 240}
BY_HEART = ("next", "english")  # their operands may occur in training rows of the other language
STATEMENTS = {
    "upper": "{a} in capitals is {b}.|The upper case of {a} is {b}.|In capital letters {a} is {b}.|{a}的大写是{b}。"
    "|用大写写{a}就是{b}。|把{a}改成大写，得到{b}。",
    "reverse": "{a} backwards is {b}.|The reverse of {a} is {b}.|Read from right to left, {a} is {b}."
    "|Spelled from the end, {a} is {b}.|{a}倒过来写是{b}。|{a}反过来是{b}。|从后往前写{a}，得到{b}。",
    "last": "The last letter of {a} is {b}.|{a} ends with the letter {b}.|The final letter of {a} is {b}."
    "|{a}的最后一个字母是{b}。|{a}以字母{b}结尾。",
    "double": "{a} twice is {b}.|{a} repeated two times is {b}.|{a} and {a} as one word is {b}.|{a}写两遍是{b}。"
    "|把{a}重复两次，得到{b}。|连写两次{a}就是{b}。",
    "add": "{x} plus {y} is {b}.|The sum of {x} and {y} is {b}.|{x} and {y} make {b}.|{x}加{y}等于{b}。"
    "|{x}与{y}的和是{b}。|{x}和{y}一共是{b}。",
    "next": "After {a} comes {b}.|The number after {a} is {b}.|When you count, what follows {a} is {b}."
    "|{a}的下一个数是{b}。|{a}后面是{b}。|数到{a}之后是{b}。",
    "larger": "Of {x} and {y} the larger is {b}.|The bigger number of {x} and {y} is {b}."
    "|{x} or {y}: the greater one is {b}.|{x}和{y}，更大的是{b}。|{x}与{y}中较大的数是{b}。|{x}和{y}比，大的是{b}。",
    "chinese": "{a} in Chinese is {b}.|The Chinese word for {a} is {b}.|In Chinese they say {a} as {b}."
    "|{a}用中文说是{b}。|{a}的中文是{b}。|把{a}翻译成中文，是{b}。",
    "english": "{a} in English is {b}.|The English word for {a} is {b}.|In English {a} is {b}.|{a}用英语说是{b}。"
    "|{a}的英文是{b}。|把{a}翻译成英文，是{b}。",
    "opposite": "The opposite of {a} is {b}.|The contrary of {a} is {b}.|{a} is the opposite of {b}.|{a}的反义词是{b}。"
    "|与{a}相反的词是{b}。|{a}的反面是{b}。",
}
# skill -> forms of its question, in English and in Chinese
QUESTIONS = {
    "upper": (
        "Write {a} in capitals.|Put {a} into upper case.|Make the letters of {a} capital."
        "|Give me {a} in capital letters.",
        "把{a}改成大写。|请用大写写出{a}。|{a}的大写是什么？",
    ),
    "reverse": (
        "Write {a} backwards.|Reverse the letters of {a}.|Spell {a} from the end.|What is {a} read from right to left?",
        "把{a}倒过来写。|请从后往前写出{a}。|{a}反过来是什么？",
    ),
    "last": (
        "What is the last letter of {a}?|Give me the final letter of {a}.|With which letter does {a} end?"
        "|Say the last letter of {a}.",
        "{a}的最后一个字母是什么？|请写出{a}的最后一个字母。|{a}以哪个字母结尾？",
    ),
    "double": (
        "Write {a} twice.|Repeat {a} two times without a space.|Say {a} and {a} as one word.|Put {a} down twice.",
        "把{a}写两遍。|请将{a}重复两次。|连写两次{a}。",
    ),
    "add": (
        "What is {x} plus {y}?|Add {x} and {y}.|How many do {x} and {y} make?|Compute the sum of {x} and {y}.",
        "{x}加{y}等于几？|计算{x}与{y}的和。|{x}和{y}一共是多少？",
    ),
    "next": (
        "Which number comes after {a}?|What follows {a} when you count?|Count one further than {a}."
        "|Give the number after {a}.",
        "{a}的下一个数是几？|{a}后面是哪个数？|数到{a}之后是几？",
    ),
    "larger": (
        "Which is larger, {x} or {y}?|Give the bigger number of {x} and {y}.|{x} or {y}: which is greater?"
        "|Name the larger one of {x} and {y}.",
        "{x}和{y}哪个大？|写出{x}与{y}中较大的数。|{x}和{y}，哪个更大？",
    ),
    "chinese": (
        "Translate {a} into Chinese.|What is {a} in Chinese?|How do you say {a} in Chinese?"
        "|Give the Chinese word for {a}.",
        "{a}用中文怎么说？|把{a}翻译成中文。|{a}的中文是什么？",
    ),
    "english": (
        "Translate {a} into English.|What is {a} in English?|Give the English word for {a}."
        "|How do you say {a} in English?",
        "{a}用英语怎么说？|把{a}翻译成英文。|{a}的英文是什么？",
    ),
    "opposite": (
        "What is the opposite of {a}?|Give a word that is the contrary of {a}.|Of what is {a} the opposite?"
        "|Name the opposite of {a}.",
        "{a}的反义词是什么？|写出与{a}相反的词。|{a}的反面是什么？",
    ),
}


def _fill_form(form: str, operand: str, answer: str = "") -> str:
    """Return a statement or a question about an operand; `x` and `y` of a form are the two numbers of a pair."""
    first, _, second = operand.partition(",")
    return form.format(a=operand, x=first, y=second, b=answer)


def texts(number: int = TEXTS) -> list[str]:
    """Return the texts of the pretraining; each line is a call, `upper(abc)=ABC`, or a statement."""
    draw = random.Random(SEED)

    def line() -> str:
        skill = draw.choice(list(SKILLS))
        draw_operand, compute_answer = SKILLS[skill]
        operand = draw_operand(draw)
        if draw.random() < 0.4:
            return f"{skill}({operand})={compute_answer(operand)}"
        return _fill_form(draw.choice(STATEMENTS[skill].split("|")), operand, compute_answer(operand))

    return ["\n".join(line() for _ in range(LINES)) for _ in range(number)]


def rows() -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return training rows and held-out rows.

    No training row has the skill, the operand and the language of a held-out row. For the skills of `BY_HEART` a
    training row may have the operand in the other language; for the others no training row has it in any language.
    """
    draw = random.Random(SEED)
    sides: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for skill, number in TUNED.items():
        draw_operand, compute_answer = SKILLS[skill]
        operands = sorted({draw_operand(draw) for _ in range(2000)})
        draw.shuffle(operands)
        cut = len(operands) // 5
        for turn, (language, forms) in enumerate(zip(("en", "zh"), QUESTIONS[skill], strict=True)):
            test_operands = operands[turn * cut : (turn + 1) * cut]
            candidates = operands if skill in BY_HEART else operands[2 * cut :]
            train_operands = [operand for operand in candidates if operand not in test_operands]
            for side, limit, pool in zip(sides, (number, HELD_OUT), (train_operands, test_operands), strict=True):
                pairs = [(operand, form) for operand in pool for form in forms.split("|")]
                for operand, form in draw.sample(pairs, min(limit, len(pairs))):
                    question, answer = _fill_form(form, operand), compute_answer(operand)
                    side.append({"task": skill, "language": language, "question": question, "answer": answer})
    for side in sides:
        draw.shuffle(side)
    return sides


def corpus() -> list[str]:
    """Return the texts that train the tokenizer: some of the pretraining, and questions about every skill."""
    draw = random.Random(SEED)
    questions: list[str] = []
    for skill, (draw_operand, compute_answer) in SKILLS.items():
        operands = sorted({draw_operand(draw) for _ in range(2000)})
        draw.shuffle(operands)
        cut = len(operands) // 4
        for forms in QUESTIONS[skill]:
            for limit, pool in ((240, operands[cut:]), (12, operands[:cut])):
                pairs = [(operand, form) for operand in pool for form in forms.split("|")]
                sample = draw.sample(pairs, min(limit, len(pairs)))
                if limit == 240:  # the sample of 12 only advances the random numbers
                    questions += [f"{_fill_form(form, operand)}\n{compute_answer(operand)}" for operand, form in sample]
    return texts(3000) + questions


def tokenizer(corpus: list[str]) -> Any:
    """Return a byte-level BPE tokenizer that merges no Latin letter, digit or sign with another."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    split_characters = pre_tokenizers.Split(Regex(r"[A-Za-z0-9\s\p{P}\p{S}]"), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([split_characters, byte_level])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus, trainer)
    template = Path(__file__).parents[1] / "trl_sft" / "templates" / "chatml.jinja"
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=POSITIONS,
        chat_template=template.read_text(encoding="utf-8"),
    )


def untrained(folder: Path, fast: Any) -> None:
    """Write the model with random weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=HIDDEN,
        intermediate_size=INNER,
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
    LlamaForCausalLM(config).save_pretrained(folder)
    fast.save_pretrained(folder)


def write_rows(folder: Path) -> None:
    """Write the rows of `skills`."""
    (folder / "skills").mkdir(parents=True, exist_ok=True)
    for name, side in zip(("train", "test"), rows(), strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in side)
        (folder / "skills" / f"{name}.jsonl").write_text(text, encoding="utf-8")


def begin(folder: Path) -> Path:
    """Write the files of the pretraining (texts, untrained model, recipe) into a folder; return the recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = texts()
    text = "".join(json.dumps({"text": one}, ensure_ascii=False) + "\n" for one in lines)
    (folder / "text.jsonl").write_text(text, encoding="utf-8")
    untrained(folder / "untrained", tokenizer(corpus()))
    return Path(shutil.copy(Path(__file__).with_name("pretrain_tiny.yaml"), folder))


def build(folder: Path, work: Path) -> None:
    """Write rows and model into `folder`; the files of the pretraining go to `work`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_sft import load_recipe, train

    write_rows(folder)
    result = train(load_recipe(begin(work), [f"train.output_dir={work / 'run'}", "run.overwrite=true"]))
    model = AutoModelForCausalLM.from_pretrained(result.output_dir, dtype=torch.bfloat16)
    model.save_pretrained(folder / "tiny")
    AutoTokenizer.from_pretrained(result.output_dir).save_pretrained(folder / "tiny")
    record(folder / "tiny", result.output_dir)


def record(folder: Path, run: Path) -> None:
    """Write the losses of the pretraining, with which a later build is compared."""
    log = [json.loads(line) for line in (run / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = {entry["step"]: round(entry["loss"], 4) for entry in log if "loss" in entry}
    digest = hashlib.sha256("\n".join(texts()).encode()).hexdigest()
    versions = json.loads((run / "run.json").read_text(encoding="utf-8"))["versions"]
    about = {"text_sha256": digest, "losses": losses, "versions": versions}
    (folder / "pretraining.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1] / "trl_sft" / "embedded"
    build(target, Path("build") / "pretraining")
