"""Times rows to packed tokens: trl_sft's single pass against TRL's preparation of the same rows, and tokenizing alone.

    python benchmarks/prepare.py [PAIRS]          pairs in turn, in alternating order, each in a fresh process
    python benchmarks/prepare.py --growth         10,000 to 1,000,000 short rows: time, anonymous memory, cache hit

Every process begins with an empty cache. The time begins after the imports, the tokenizer and the reading of the rows;
TRL's is that of its `_prepare_dataset`. Tokens and labels of both are compared before a ratio is printed. They differ
by the newline that ChatML writes after the end-of-turn token, one for each row or answer: TRL trains it, trl_sft does
not.
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
    "trl_sft": "trl_sft",
    "trl": "TRL, dataset_num_proc unset",
    "trl2": "TRL, dataset_num_proc 2",
    "encode": "encode_batch alone",
}


def make_words(rng, number):
    """Return invented words of one to four syllables."""
    ends = ("", "", "n", "r", "s", "t")
    words = set()
    while len(words) < number:
        syllables = [
            rng.choice("bcdfghjklmnprstvz") + rng.choice("aeiou") + rng.choice(ends) for _ in range(rng.randint(1, 4))
        ]
        words.add("".join(syllables))
    return rng.sample(sorted(words), len(words))


def make_rows(kind, number, length=4.2):
    """Yield rows in TRL's form, whose words are as frequent as those of a language."""
    rng = random.Random(0)
    vocabulary = make_words(rng, 60_000)
    weights = list(itertools.accumulate(1 / (n + 10) for n in range(len(vocabulary))))

    def make_text(mean, longest):
        count = max(3, min(int(rng.lognormvariate(mean, 0.7)), longest))
        return " ".join(rng.choices(vocabulary, cum_weights=weights, k=count)).capitalize() + "."

    for _ in range(number):
        if kind == "plain":
            yield {"prompt": make_text(3.3, 60), "completion": " " + make_text(length, 900)}
        elif kind == "chat":
            yield {
                "prompt": [make_turn("user", make_text(3.3, 60))],
                "completion": [make_turn("assistant", make_text(length, 900))],
            }
        else:
            pairs = [
                (make_turn("user", make_text(2.5, 40)), make_turn("assistant", make_text(length - 1, 300)))
                for _ in range(3)
            ]
            yield {"messages": [message for pair in pairs for message in pair]}


def make_turn(role, content):
    return {"role": role, "content": content}


def write_rows(folder, kind, number, *, length=4.2):
    """Write the rows in TRL's form and in trl_sft's."""
    from datasets import Dataset, Features, Json, List, Value

    trl_rows = list(make_rows(kind, number, length))
    if kind == "turns":
        rows = [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in trl_rows]
    else:
        rows = trl_rows
    chat = Features({"prompt": List(Json()), "completion": List(Json())})
    plain = Features({"prompt": Value("string"), "completion": Value("string")})
    Dataset.from_list(rows, features=plain if kind == "plain" else chat).save_to_disk(folder / "trl_sft")
    features = {"turns": Features({"messages": List(Json())}), "plain": plain, "chat": chat}
    Dataset.from_list(trl_rows, features=features[kind]).save_to_disk(folder / "trl")


def write_model(folder):
    """Train a byte-level BPE of 32,000 tokens on such rows; write it with ChatML and a minute model."""
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
    bpe.train_from_iterator((row["prompt"] + row["completion"] for row in make_rows("plain", ROWS)), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = (Path(__file__).parents[1] / "trl_sft" / "templates" / "chatml.jinja").read_text()
    tokenizer.save_pretrained(folder)
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, **small)).save_pretrained(folder)


def measure_side(side, kind, *, folder, rows_folder):
    """Prepare the rows in this process; print seconds, digests and memory as a line of JSON."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    packs, results = None, {}
    memory = Memory()
    if side == "trl_sft":
        dataset = Dataset.load_from_disk(rows_folder / "trl_sft")
        seconds, packs, results = prepare_with_trl_sft(kind, tokenizer, dataset, memory=memory)
    elif side == "encode":
        texts = render_texts(kind, tokenizer, Dataset.load_from_disk(rows_folder / "trl_sft"))
        began = time.perf_counter()
        for start in range(0, len(texts), 1000):
            tokenizer.backend_tokenizer.encode_batch(texts[start : start + 1000], add_special_tokens=False)
        seconds = time.perf_counter() - began
    else:
        dataset = Dataset.load_from_disk(rows_folder / "trl")
        processes = 2 if side == "trl2" else None
        seconds, packs = prepare_with_trl(kind, folder, tokenizer=tokenizer, dataset=dataset, processes=processes)
    if packs is not None:
        results |= digest_packs(packs, tokenizer.convert_tokens_to_ids("<|im_end|>"))
    print(json.dumps({"seconds": seconds} | results | memory.stop()))


def prepare_with_trl_sft(kind, tokenizer, dataset, *, memory):
    """Return seconds, packs and the seconds of a cache hit of trl_sft."""
    import numpy as np

    from trl_sft.data.formats import CHAT, PAIRS
    from trl_sft.data.pipeline import Split
    from trl_sft.tokenization import cache as tokenization_cache
    from trl_sft.tokenization.encoder import EncodingSettings, build_encoder

    row_type = PAIRS if kind == "plain" else CHAT
    every = np.arange(len(dataset))
    split = Split(
        dataset, (), np.zeros_like(every), every, every, {}, {}, "rows"
    )  # the cache is empty, so any key will do
    memory.start()
    began = time.perf_counter()
    encoder = build_encoder(EncodingSettings(row_type, KINDS[kind], "<|im_end|>", LENGTH), tokenizer, {})

    def tokenize_and_pack():
        encoded = tokenization_cache.read_or_encode(split, encoder, Path("bench"), title="Tokenizing", most_bad_rows=0)
        return tokenization_cache.pack(encoded, LENGTH, "bfd", seed=None)

    packs = tokenize_and_pack()
    seconds = time.perf_counter() - began
    hit_began = time.perf_counter()
    tokenize_and_pack()
    return seconds, packs, {"hit": time.perf_counter() - hit_began}


def prepare_with_trl(kind, folder, *, tokenizer, dataset, processes):
    """Return seconds and packs of TRL."""
    from trl import SFTConfig, SFTTrainer

    times = []
    prepare = SFTTrainer._prepare_dataset

    def time_preparation(*args, **kwargs):
        began = time.perf_counter()
        dataset = prepare(*args, **kwargs)
        times.append(time.perf_counter() - began)
        return dataset

    SFTTrainer._prepare_dataset = time_preparation
    args = SFTConfig(
        **{"output_dir": str(folder / "out"), "use_cpu": True, "bf16": False, "report_to": "none", "packing": True},
        **{"max_length": LENGTH, "dataset_num_proc": processes, "assistant_only_loss": kind == "turns"},
    )
    trainer = SFTTrainer(str(folder), args=args, train_dataset=dataset, processing_class=tokenizer)
    return times[0], trainer.train_dataset


def render_texts(kind, tokenizer, dataset):
    """Return the texts of the rows."""
    if kind == "plain":
        return [row["prompt"] + row["completion"] + "<|im_end|>" for row in dataset]
    return tokenizer.apply_chat_template([row["prompt"] + row["completion"] for row in dataset], tokenize=False)


def digest_packs(packs, end):
    """Return digests of tokens and labels, without the label after an end-of-turn token, and the number of labels."""
    import numpy as np

    tokens, labels, trained = hashlib.sha256(), hashlib.sha256(), 0
    for start in range(0, len(packs), 100):
        batch = packs[start : start + 100]
        ids = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch["input_ids"]])
        batch_labels = np.concatenate([np.asarray(row, dtype=np.int64) for row in batch["labels"]])
        trained += int((batch_labels != -100).sum())
        batch_labels[1:][ids[:-1] == end] = -100
        tokens.update(ids.tobytes())
        labels.update(batch_labels.tobytes())
    return {"packs": len(packs), "tokens": tokens.hexdigest(), "labels": labels.hexdigest(), "trained": trained}


class Memory:
    """The peak of anonymous memory of this process, from smaps_rollup."""

    def __init__(self):
        self.peak, self.base, self.thread, self.end = 0, 0, None, threading.Event()

    def start(self):
        self.base = self.read()
        self.thread = threading.Thread(target=self.record_peak, daemon=True)
        self.thread.start()

    def read(self):
        for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
            if line.startswith("Anonymous:"):
                return int(line.split()[1]) / 1024
        return 0

    def record_peak(self):
        while not self.end.wait(0.2):
            self.peak = max(self.peak, self.read())

    def stop(self):
        self.end.set()
        return {"mib": round(self.peak), "base_mib": round(self.base)} if self.thread else {}


def run(side, kind, *, folder, rows_folder):
    """Prepare rows in a fresh process with an empty cache; return what it printed."""
    with tempfile.TemporaryDirectory() as cache:
        copy = Path(cache) / "rows"  # TRL writes beside the rows
        shutil.copytree(rows_folder, copy)
        environment = {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, __file__, "--work", side, kind, str(folder), str(copy)]
        process = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if process.returncode:
        raise SystemExit(process.stderr[-2000:])
    return json.loads(process.stdout.strip().splitlines()[-1])


def main(pairs):
    """Compare tokens and labels, then print times and ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for kind in KINDS:
            write_rows(folder / kind, kind, ROWS)
            measurements = {side: [] for side in SOURCES}
            for n in range(pairs):
                for side in list(SOURCES)[:: 1 if n % 2 == 0 else -1]:
                    measurements[side].append(run(side, kind, folder=folder / "model", rows_folder=folder / kind))
            result, trl_result = measurements["trl_sft"][0], measurements["trl"][0]
            for part in ("packs", "tokens", "labels"):
                assert result[part] == trl_result[part], f"{kind}: {part} differ"
            newlines = trl_result["trained"] - result["trained"]
            seconds = {side: statistics.median(run["seconds"] for run in measurements[side]) for side in SOURCES}
            print(f"{kind}: {ROWS:,} rows, {result['packs']:,} packs")
            print(f"  tokens are equal; labels are equal except for {newlines:,} newlines")
            for side, title in SOURCES.items():
                ratios = sorted(
                    a["seconds"] / b["seconds"]
                    for a, b in zip(measurements[side], measurements["trl_sft"], strict=True)
                )
                ratio = statistics.median(ratios)
                spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
                speed = f"{seconds[side]:6.2f} s  {ROWS / seconds[side]:8,.0f} rows/s"
                print(f"  {title:<30} {speed}  {ratio:.2f} of trl_sft ({spread})")
            print(f"  cache hit {statistics.median(run['hit'] for run in measurements['trl_sft']):.3f} s", flush=True)


def measure_growth():
    """Print time and memory for more and more rows."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model")
        for number in (10_000, 100_000, 1_000_000):
            write_rows(folder / str(number), "chat", number, length=2.0)
            result = run("trl_sft", "chat", folder=folder / "model", rows_folder=folder / str(number))
            speed = f"{result['seconds']:.1f} s, {number / result['seconds']:,.0f} rows/s"
            memory = f"anonymous memory {result['mib']} MiB at most, {result['base_mib']} MiB before"
            print(f"{number:>9,} short rows: {speed}; {memory}; cache hit {result['hit']:.2f} s", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        measure_side(sys.argv[2], sys.argv[3], folder=Path(sys.argv[4]), rows_folder=Path(sys.argv[5]))
    elif sys.argv[1:2] == ["--growth"]:
        measure_growth()
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
