"""A training step: ours against SFTTrainer as it comes, on the same packs; losses are compared first.

    python benchmarks/step.py [PAIRS] [--alone]

4 packs of 1,024 tokens, 32,000 words, a Llama of about 5 M parameters in float32, AdamW; every position has a label,
and then a third of them (answers). Each side runs in a fresh process, in turn, order swapped; a step is the median of
all but the first. "arithmetic" is that alone: the same matrix products without a trainer, documents apart, PyTorch's
cross entropy. Ours is three things: the loss, attention by document, large tensors in huge pages; --alone measures
each of them too.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time

STEPS, PACKS, LENGTH, VOCABULARY = 6, 4, 1024, 32_000
SHAPE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 4, "num_attention_heads": 4}
LOGGED = ("loss", "grad_norm", "entropy", "mean_token_accuracy")
FLOOR = "arithmetic"
SIDES, ALONE = ("ours", "trl", FLOOR), ("loss alone", "attention alone", "huge pages alone")
HUGE = ("ours", "huge pages alone", FLOOR)  # what a run sets before torch allocates


def model():
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, tie_word_embeddings=True, **SHAPE))


def packs(share):
    """Return packs of documents of 60 to 240 tokens; `share` of each document's end has labels."""
    import numpy as np

    draw = np.random.default_rng(0)
    out = {"input_ids": [], "labels": [], "seq_lengths": []}
    for _ in range(PACKS * STEPS):
        lengths = []
        while sum(lengths) < LENGTH:
            lengths.append(int(min(draw.integers(60, 240), LENGTH - sum(lengths))))
        ids = draw.integers(5, VOCABULARY, LENGTH)
        labels, start = np.full(LENGTH, -100), 0
        for length in lengths:
            first = start + round(length * (1 - share))
            labels[first : start + length] = ids[first : start + length]
            start += length
        for name, value in (("input_ids", ids.tolist()), ("labels", labels.tolist()), ("seq_lengths", lengths)):
            out[name].append(value)
    return out


def work(side, share):
    import tempfile

    import torch
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = time.perf_counter()

        def on_step_end(self, *_, **__):
            times.append(time.perf_counter() - self.began)

    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0, "e": 1})), eos_token="e")
    with tempfile.TemporaryDirectory() as folder:
        args = SFTConfig(
            **{"output_dir": folder, "use_cpu": True, "bf16": False, "report_to": "none", "save_strategy": "no"},
            **{"packing": True, "max_length": LENGTH, "per_device_train_batch_size": PACKS, "max_steps": STEPS},
            **{"logging_steps": 1, "dataset_kwargs": {"skip_prepare_dataset": True}, "gradient_checkpointing": False},
        )
        rows = Dataset.from_dict(packs(share))
        trainer = SFTTrainer(model(), args=args, train_dataset=rows, processing_class=tokenizer, callbacks=[Clock()])
        if side in ("ours", "loss alone"):
            from trl_sft.model import cpu_loss

            assert cpu_loss.install(trainer.model, cpu_loss.LOGITS_GIB)
        if side in ("ours", "attention alone"):
            from trl_sft.model import packed_attention

            assert packed_attention.install(trainer.model)
        trainer.train()
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    found = {
        name: [entry[name] for entry in entries] for name in ("loss", "grad_norm", "entropy", "mean_token_accuracy")
    }
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        json.dumps(
            {"seconds": statistics.median(times[1:]), "mib": round(peak), "threads": torch.get_num_threads()} | found
        )
    )


def floor(share):
    """Time forward and backward of the same arithmetic: the model on each document, the head on what has a label."""
    import torch

    made, rows = model(), packs(share)
    times = []
    for step in range(4):
        began = time.perf_counter()
        count = sum(label != -100 for pack in range(PACKS) for label in rows["labels"][step * PACKS + pack])
        for pack in range(step * PACKS, (step + 1) * PACKS):
            start, hidden, labels = 0, [], []
            for length in rows["seq_lengths"][pack]:
                ids = torch.tensor([rows["input_ids"][pack][start : start + length]])
                hidden.append(made.model(ids, use_cache=False).last_hidden_state[0, :-1])
                labels.append(torch.tensor(rows["labels"][pack][start + 1 : start + length]))
                start += length
            hidden, labels = torch.cat(hidden), torch.cat(labels)
            logits = made.lm_head(hidden[labels != -100])
            (torch.nn.functional.cross_entropy(logits, labels[labels != -100], reduction="sum") / count).backward()
        times.append(time.perf_counter() - began)
    print(json.dumps({"seconds": statistics.median(times[1:])}))


def run(*words):
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    quiet["THP_MEM_ALLOC_ENABLE"] = str(int(words[0] in HUGE))
    done = subprocess.run(
        [sys.executable, __file__, "--work", *words],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | quiet,
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(pairs, sides):
    for share in ("1.0", "0.33"):
        found = {side: [] for side in sides}
        for n in range(pairs):
            for side in sides[:: 1 if n % 2 == 0 else -1]:
                found[side].append(run(side, share))
        for name in LOGGED:
            theirs = found["trl"][0][name]
            worst = max(abs(a - b) / max(abs(b), 1e-9) for a, b in zip(found["ours"][0][name], theirs, strict=True))
            assert worst < 1e-4 or name == "mean_token_accuracy", (name, worst)
            print(f"  {name}: differs by {worst:.1e} at most, of {theirs[0]:.6g}")
        print(f"{float(share):.0%} of the positions have a label; {found['ours'][0]['threads']} threads, {pairs} pairs")
        for side in sides:
            seconds = statistics.median(one["seconds"] for one in found[side])
            memory = f", {found[side][0]['mib']:,} MiB at most" if "mib" in found[side][0] else ""
            print(f"  {side:<16} {seconds:5.2f} s a step, {ratio(found, 'trl', side)} times as fast as TRL{memory}")
        print(f"  ours takes {ratio(found, 'ours', FLOOR)} times as long as the arithmetic alone", flush=True)


def ratio(found, above, below):
    """Return the median of what the pairs give, with the least and the most."""
    pairs = zip(found[above], found[below], strict=True)
    ratios = sorted(a["seconds"] / b["seconds"] for a, b in pairs)
    return f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        floor(float(sys.argv[3])) if sys.argv[2] == FLOOR else work(sys.argv[2], float(sys.argv[3]))
    else:
        numbers = [int(word) for word in sys.argv[1:] if word.isdecimal()]
        main(*numbers or [3], (*SIDES, *ALONE) if "--alone" in sys.argv else SIDES)
