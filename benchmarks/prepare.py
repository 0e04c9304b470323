"""Rows to packed tokens: our one pass against TRL's own preparation of the same rows, and against tokenizing alone.

    python benchmarks/prepare.py [PAIRS]          times: pairs in turn, order swapped, each in a fresh process
    python benchmarks/prepare.py --growth         10,000 to 1,000,000 short rows: time, anonymous memory, cache hit

Every process begins with an empty cache; timed is what comes after the imports, the tokenizer and the reading of
the rows in TRL's form. TRL's figure is the time of its `_prepare_dataset`. Tokens and labels of both are compared
before a ratio is printed: they differ by the newline that ChatML writes after the end, one a row or answer, which
TRL trains and we do not.
"""

import hashlib
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROWS, VOCABULARY, LENGTH = 30_000, 32_000, 1024
KINDS = {"chat": "completion", "turns": "assistant", "plain": "completion"}
SOURCES = {
    "ours": "trl_sft's pass",
    "trl": "TRL, dataset_num_proc unset",
    "trl2": "TRL, dataset_num_proc 2",
    "encode": "encode_batch alone",
}


def words(draw, number):
    """Return made-up words of one to four syllables."""
    found = set()
    while len(found) < number:
        ends = ("", "", "n", "r", "s", "t")
        found.add(
            "".join(
                draw.choice("bcdfghjklmnprstvz") + draw.choice("aeiou") + draw.choice(ends)
                for _ in "x" * draw.randint(1, 4)
            )
        )
    return draw.sample(sorted(found), len(found))


def rows(kind, number, length=4.2):
    """Yield rows in TRL's form, of words that are drawn as language draws them."""
    draw = random.Random(0)
    known = words(draw, 60_000)
    weights = list(itertools.accumulate(1 / (n + 10) for n in range(len(known))))

    def text(mean, most):
        count = max(3, min(int(draw.lognormvariate(mean, 0.7)), most))
        return " ".join(draw.choices(known, cum_weights=weights, k=count)).capitalize() + "."

    for _ in range(number):
        if kind == "plain":
            yield {"prompt": text(3.3, 60), "completion": " " + text(length, 900)}
        elif kind == "chat":
            yield {"prompt": [turn("user", text(3.3, 60))], "completion": [turn("assistant", text(length, 900))]}
        else:
            pairs = [(turn("user", text(2.5, 40)), turn("assistant", text(length - 1, 300))) for _ in range(3)]
            yield {"messages": [message for pair in pairs for message in pair]}


def turn(role, content):
    return {"role": role, "content": content}


def build(folder, kind, number, length=4.2):
    """Write rows, once as TRL's form and once as ours, and a tokenizer with ChatML."""
    from datasets import Dataset, Features, Json, List, Value

    made = list(rows(kind, number, length))
    if kind == "turns":
        ours = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in made]
    else:
        ours = made
    chat = Features({"prompt": List(Json()), "completion": List(Json())})
    plain = Features({"prompt": Value("string"), "completion": Value("string")})
    Dataset.from_list(ours, features=plain if kind == "plain" else chat).save_to_disk(folder / "ours")
    theirs = Features({"messages": List(Json())}) if kind == "turns" else plain if kind == "plain" else chat
    Dataset.from_list(made, features=theirs).save_to_disk(folder / "theirs")


def tokenizer(folder):
    """Train a byte-level BPE of 32,000 tokens on rows like those that are prepared."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in rows("plain", ROWS)), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = (Path(__file__).parents[1] / "trl_sft" / "templates" / "chatml.jinja").read_text()
    made.save_pretrained(folder)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **small)).save_pretrained(folder)


def work(side, kind, folder, forms):
    """Prepare the rows one way in this process; print seconds and what was made as one line of JSON."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    made = AutoTokenizer.from_pretrained(folder)
    packs, out = None, {}
    memory = Memory()
    if side == "ours":
        seconds, packs, out = ours(kind, made, Dataset.load_from_disk(forms / "ours"), memory)
    elif side == "encode":
        texts = texts_of(kind, made, Dataset.load_from_disk(forms / "ours"))
        began = time.perf_counter()
        for start in range(0, len(texts), 1000):
            made.backend_tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        seconds = time.perf_counter() - began
    else:
        seconds, packs = theirs(
            kind, folder, made, Dataset.load_from_disk(forms / "theirs"), 2 if side == "trl2" else None
        )
    if packs is not None:
        out |= compared(packs, made.convert_tokens_to_ids("<|im_end|>"))
    print(json.dumps({"seconds": seconds} | out | memory.stopped()))


def ours(kind, made, forms, memory):
    import numpy as np

    from trl_sft.tokenization import cache as tokenization_cache
    from trl_sft.tokenization import encode

    form = encode.PAIRS if kind == "plain" else encode.CHAT
    memory.start()
    began = time.perf_counter()
    plan = encode.Plan(form, KINDS[kind], "<|im_end|>", LENGTH)
    encoder = encode.encoder(plan, made, {})
    job = tokenization_cache.Work(forms, np.arange(len(forms)), str, "Tokenizing")
    packs = tokenization_cache.packed(tokenization_cache.made(job, encoder, Path("bench")), LENGTH, "bfd", None)
    seconds = time.perf_counter() - began
    again = time.perf_counter()
    tokenization_cache.packed(tokenization_cache.made(job, encoder, Path("bench")), LENGTH, "bfd", None)
    return seconds, packs, {"hit": time.perf_counter() - again}


def theirs(kind, folder, made, dataset, processes):
    from trl import SFTConfig, SFTTrainer

    times = []
    prepare = SFTTrainer._prepare_dataset

    def timed(*given, **named):
        began = time.perf_counter()
        found = prepare(*given, **named)
        times.append(time.perf_counter() - began)
        return found

    SFTTrainer._prepare_dataset = timed
    args = SFTConfig(
        **{"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "packing": True},
        **{"max_length": LENGTH, "dataset_num_proc": processes, "assistant_only_loss": kind == "turns"},
    )
    trainer = SFTTrainer(str(folder), args=args, train_dataset=dataset, processing_class=made)
    return times[0], trainer.train_dataset


def texts_of(kind, made, forms):
    if kind == "plain":
        return [row["prompt"] + row["completion"] + "<|im_end|>" for row in forms]
    return made.apply_chat_template([row["prompt"] + row["completion"] for row in forms], tokenize=False)


def compared(packs, end):
    """Return digests of the packs' tokens and of the labels without what follows an end token; how many are trained."""
    import numpy as np

    tokens, labels, trained = hashlib.sha256(), hashlib.sha256(), 0
    for start in range(0, len(packs), 100):
        batch = packs[start : start + 100]
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch["input_ids"]])
        marks = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch["labels"]])
        trained += int((marks != -100).sum())
        marks[1:][ids[:-1] == end] = -100
        tokens.update(ids.tobytes())
        labels.update(marks.tobytes())
    return {"packs": len(packs), "tokens": tokens.hexdigest(), "labels": labels.hexdigest(), "trained": trained}


class Memory:
    """The most anonymous memory that this process held while it was watched, from smaps_rollup."""

    def __init__(self):
        self.most, self.base, self.thread, self.done = 0, 0, None, threading.Event()

    def start(self):
        self.base = self.read()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def read(self):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) / 1024
        return 0

    def watch(self):
        while not self.done.wait(0.2):
            self.most = max(self.most, self.read())

    def stopped(self):
        self.done.set()
        return {"mib": round(self.most), "base_mib": round(self.base)} if self.thread else {}


def run(side, kind, folder, forms):
    """Run one way in a fresh process with an empty cache; return what it printed."""
    with tempfile.TemporaryDirectory() as cache:
        copy = Path(cache) / "rows"  # TRL's maps write beside the rows
        shutil.copytree(forms, copy)
        quiet = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--work", side, kind, str(folder), str(copy)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | quiet)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(pairs):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer(folder / "model")
        for kind in KINDS:
            build(folder / kind, kind, ROWS)
            found = {side: [] for side in SOURCES}
            for n in range(pairs):
                for side in list(SOURCES)[:: 1 if n % 2 == 0 else -1]:
                    found[side].append(run(side, kind, folder / "model", folder / kind))
            mine, other = found["ours"][0], found["trl"][0]
            for what in ("packs", "tokens", "labels"):
                assert mine[what] == other[what], f"{kind}: {what} differ"
            extra = other["trained"] - mine["trained"]
            seconds = {side: statistics.median(one["seconds"] for one in found[side]) for side in SOURCES}
            print(
                f"{kind}: {ROWS:,} rows, {mine['packs']:,} packs; tokens equal, labels equal but for {extra:,} newlines"
            )
            for side, title in SOURCES.items():
                ratios = sorted(a["seconds"] / b["seconds"] for a, b in zip(found[side], found["ours"], strict=True))
                ratio = statistics.median(ratios)
                spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
                speed = f"{seconds[side]:6.2f} s  {ROWS / seconds[side]:8,.0f} rows/s"
                print(f"  {title:<30} {speed}  {ratio:.2f} of ours ({spread})")
            print(f"  cache hit {statistics.median(one['hit'] for one in found['ours']):.3f} s", flush=True)


def growth():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer(folder / "model")
        for number in (10_000, 100_000, 1_000_000):
            build(folder / str(number), "chat", number, length=2.0)
            one = run("ours", "chat", folder / "model", folder / str(number))
            speed = f"{one['seconds']:.1f} s, {number / one['seconds']:,.0f} rows/s"
            memory = f"anonymous memory {one['mib']} MiB at most, {one['base_mib']} MiB before"
            print(f"{number:>9,} short rows: {speed}; {memory}; cache hit {one['hit']:.2f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(sys.argv[2], sys.argv[3], Path(sys.argv[4]), Path(sys.argv[5]))
    elif sys.argv[1:2] == ["--growth"]:
        growth()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
