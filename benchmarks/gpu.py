"""A step on a GPU: tokens a second, MFU and memory for ways to tune, to attend and to score; losses are compared first.

    python benchmarks/gpu.py [--minutes 8] [--pairs 3] [--steps 8] [--peak TFLOPS] [--out FILE.jsonl]
    python benchmarks/gpu.py --device cpu --tiny     every line of it in small, without a card

A model of the shape of Qwen2.5-0.5B with random weights, made here with its tokenizer; 8 packs of 2,048 tokens, 4
documents in each, or the same 32 documents padded; every token has a label. A group is one way to tune (all weights,
LoRA, LoRA on 8-bit and 4-bit weights), packed or not, with gradient checkpointing or without. Its sides differ in
attention (sdpa, ours by document, flex_attention, flash_attention_2, a kernel of the hub) and in loss (TRL's, ours);
"sdpa, trl" is SFTTrainer as it comes. The sides of a group run in one fresh process, in turn, order turned round each
time, PAIRS times; a step is the median of all but the first two. Losses are those of the same batches in the same
order, and a side whose losses differ gets no ratio. Groups go by interest; what --minutes did not reach is named.

MFU is arithmetic over time over the card's peak; `mfu.py` has the formula, the peaks and where they are from.
"""

import argparse
import gc
import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from mfu import DOCUMENTS, PEAKS, SHAPE, TINY, build, data, flops

FULL, LORA, EIGHT, FOUR = "full", "lora", "lora 8-bit", "lora 4-bit"
# (tuning, packed, checkpointing), the most interesting first
GROUPS = [(FULL, True, False), (LORA, True, False), (FOUR, True, False), (FULL, True, True), (EIGHT, True, False)]
GROUPS += [(FULL, False, False), (LORA, False, False), (LORA, True, True), (FOUR, False, False), (EIGHT, False, False)]
GROUPS += [(FULL, False, True), (FOUR, True, True), (EIGHT, True, True), (LORA, False, True), (FOUR, False, True)]
GROUPS += [(EIGHT, False, True)]
PLAIN = ("sdpa", "trl")
SIDES = [PLAIN, ("documents", "ours"), ("sdpa", "ours"), ("documents", "trl"), ("flash_attention_2", "trl")]
SIDES += [("flex_attention", "trl"), ("kernels-community/flash-attn2", "trl")]
WARM = 2  # steps that do not count
GRACE = 60  # seconds that a group may take beyond the time


def missing(side, group, options):
    """Return why a side cannot run here; "" = it can."""
    (attention, loss), (tuning, packed, _) = side, group
    if tuning in (EIGHT, FOUR) and importlib.util.find_spec("bitsandbytes") is None:
        return "bitsandbytes is not installed"
    packages = {"flash_attention_2": "flash_attn", "kernels-community/flash-attn2": "kernels"}
    if attention in packages and importlib.util.find_spec(packages[attention]) is None:
        return f"{packages[attention]} is not installed"
    if attention == "documents" and not packed:
        return "a padded row is one document"
    if options.device == "cpu" and attention not in ("sdpa", "documents"):
        return f"{attention} has no backward pass on a CPU"
    if loss == "ours":
        from trl_sft.model import cpu_loss as own

        return "" if own.AVAILABLE else "this TRL has no fused head for ours to stand in"
    return ""


def trainer(side, group, folder, options, callback):
    """Return SFTTrainer with the attention and the loss of a side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    (attention, _), (tuning, packed, checkpointing) = side, group
    cuda = options.device == "cuda"
    packs, apart = data(options)
    batch = options.packs if packed else options.packs * DOCUMENTS
    how = {"dtype": "float32" if tuning == FULL or not cuda else "bfloat16"}  # as the recipes have it
    how["attn_implementation"] = "sdpa" if attention == "documents" else attention
    args = SFTConfig(
        **{"output_dir": str(folder / "out"), "use_cpu": not cuda, "bf16": cuda, "report_to": "none", "seed": 1},
        **{"packing": packed, "max_length": options.length, "per_device_train_batch_size": batch},
        **{"max_steps": options.steps, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-4},
        **{"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        **{"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"},
        **{"model_init_kwargs": how, "dataloader_pin_memory": cuda, "disable_tqdm": True},
    )
    bits = {EIGHT: {"load_in_8bit": True}, FOUR: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}.get(tuning)
    if bits and tuning == FOUR:
        bits["bnb_4bit_compute_dtype"] = torch.bfloat16 if cuda else torch.float32
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        **{"model": str(folder), "args": args, "callbacks": [callback]},
        train_dataset=Dataset.from_dict(packs if packed else apart),
        quantization_config=BitsAndBytesConfig(**bits) if bits else None,
        peft_config=None if tuning == FULL else lora,
    )


def install(side, model):
    """Put our attention and our loss into a model."""
    from trl.trainer import utils

    from trl_sft.model import cpu_loss as model_cpu_loss
    from trl_sft.model import packed_attention, patches

    if side != PLAIN:
        patches.repair(model)  # as a run does: the trial of our attention would pack 4-bit weights on a CPU
    if side[0] == "documents":
        assert packed_attention.install(model)
    if side[1] == "ours":
        before = utils._use_triton  # with Triton ours leaves TRL's alone; here the two are compared
        utils._use_triton = lambda _: False
        try:
            assert model_cpu_loss.install(model, model_cpu_loss.LOGITS_GIB)
        finally:
            utils._use_triton = before


def measure(side, group, folder, options):
    """Train a few steps; return seconds of each, losses and the most memory."""
    import torch
    from transformers import TrainerCallback

    cuda, times = options.device == "cuda", []

    def now():
        torch.cuda.synchronize() if cuda else None
        return time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = now()

        def on_step_end(self, *_, **__):
            times.append(now() - self.began)

    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    made = trainer(side, group, folder, options, Clock())
    install(side, made.model)
    made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    assert len(losses) == len(times) == options.steps
    assert all(math.isfinite(loss) for loss in losses)
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"seconds": statistics.median(times[min(WARM, len(times) - 1) :]), "losses": losses, "gib": gib}


def work(number, folder, options):
    """Measure the sides of one group in turn; print each run as a line of JSON."""
    group = GROUPS[number]
    able = []
    for side in SIDES:
        why = missing(side, group, options)
        able += [] if why else [side]
        print(json.dumps({"side": side, "skipped": why}), flush=True) if why else None
    for n in range(options.pairs):
        for side in tuple(able)[:: 1 if n % 2 == 0 else -1]:
            if time.time() > options.until:
                return
            try:
                line = measure(side, group, folder, options)
            except Exception as error:  # no memory, no kernel for this card: the other sides go on
                able.remove(side)
                line = {"skipped": f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:160]}"}
            print(json.dumps({"side": side} | line), flush=True)


def cells(number, lines, options):
    """Return what is known of each side of a group: one dict a side, in order, and the ratio to SFTTrainer."""
    tuning, packed, checkpointing = GROUPS[number]
    about = {"tuning": tuning, "packed": packed, "checkpointing": checkpointing}
    found = []
    plain = [line for line in lines if tuple(line["side"]) == PLAIN and "seconds" in line]
    for side in SIDES:
        mine = [line for line in lines if tuple(line["side"]) == side]
        runs = [line for line in mine if "seconds" in line]
        cell = about | {"attention": side[0], "loss": side[1], "runs": len(runs)}
        if not runs:
            found.append(cell | {"skipped": mine[-1]["skipped"] if mine else "not reached"})
            continue
        seconds = statistics.median(run["seconds"] for run in runs)
        cell |= {"seconds": seconds, "tokens_per_second": round(options.packs * options.length / seconds)}
        cell["mfu"] = flops(options, tuning != FULL) / seconds / (options.peak * 1e12) if options.peak else None
        memory = [run["gib"] for run in runs if run["gib"]]
        cell |= {"gib": max(memory) if memory else None, "losses": runs[0]["losses"]}
        if plain:
            pairs = zip(runs[0]["losses"], plain[0]["losses"], strict=True)
            cell["differs"] = max(abs(a - b) / abs(b) for a, b in pairs)
            # bfloat16 has 8 bits: steps apart by rounding alone stay within this
            same = cell["differs"] < (2e-2 if options.device == "cuda" else 1e-4)
            base = statistics.median(run["seconds"] for run in plain)
            cell["ratio"] = base / seconds if same else None
        found.append(cell)
    return found


def table(found):
    """Print the cells, a line each."""
    print(f"{'tuning':<11}{'rows':<9}{'again':<6}{'attention':<31}{'loss':<6}{'tokens/s':>10}{'MFU':>7}", end="")
    print(f"{'GiB':>7}  {'losses':<19}{'differ by':>10}  times SFTTrainer's speed")
    for cell in (cell for cell in found if "skipped" not in cell):
        rows, again = ("packed" if cell["packed"] else "padded"), ("yes" if cell["checkpointing"] else "no")
        print(f"{cell['tuning']:<11}{rows:<9}{again:<6}{cell['attention']:<31}{cell['loss']:<6}", end="")
        mfu, gib = (f"{cell['mfu']:.1%}" if cell["mfu"] else "-"), (f"{cell['gib']:.1f}" if cell["gib"] else "-")
        losses = f"{cell['losses'][0]:.4f} to {cell['losses'][-1]:.4f}"
        why = "losses differ" if "differs" in cell else "SFTTrainer did not run"
        ratio = f"{cell['ratio']:.2f}" if cell.get("ratio") else f"none: {why}"
        print(f"{cell['tokens_per_second']:>10,}{mfu:>7}{gib:>7}  {losses:<19}{cell.get('differs', 0):>10.1e}  {ratio}")


def skipped(found):
    """Print what did not run and why, each reason once."""
    reasons = {}
    for cell in (cell for cell in found if "skipped" in cell):
        groups = reasons.setdefault((f"{cell['attention']}, {cell['loss']}", cell["skipped"]), [])
        groups.append(f"{cell['tuning']} {'packed' if cell['packed'] else 'padded'}")
    for (side, why), groups in reasons.items():
        print(f"skipped: {side}: {why} ({', '.join(dict.fromkeys(groups))})")


def run(number, folder, words, options):
    """Run one group in a fresh process; return its lines."""
    quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--work", str(number), str(folder), str(options.until), *words]
    told, errors = folder / "stdout", folder / "stderr"
    with told.open("w") as stdout, errors.open("w") as stderr:
        streams = {"stdout": stdout, "stderr": stderr, "env": quiet | os.environ}
        try:
            left = max(options.until - time.time(), 0) + GRACE
            code = subprocess.run(command, check=False, timeout=left, **streams).returncode
        except subprocess.TimeoutExpired:
            code = 0
    lines = [json.loads(line) for line in told.read_text().splitlines() if line.startswith('{"side"')]
    if code:
        last = (errors.read_text().strip().splitlines() or ["no text"])[-1][:200]
        lines += [{"side": side, "skipped": f"the process ended with {code}: {last}"} for side in SIDES]
    return lines


def settled(words):
    """Return the options, with what follows from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peak", type=float, help="TFLOPS of the card in bfloat16, dense")
    parser.add_argument("--out", type=Path, help="the cells as lines of JSON")
    options = parser.parse_args(words)
    options.shape = TINY if options.tiny else SHAPE
    options.packs, options.length = (2, 128) if options.tiny else (8, 2048)
    options.steps, options.pairs = (2, 1) if options.tiny else (options.steps, options.pairs)
    return options


def main(words):
    import torch

    options = settled(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        return print("skipped: no CUDA device")
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    options.peak = options.peak or next((peak for name, peak in PEAKS.items() if name in card), None)
    peak = f"{options.peak:g} TFLOPS" if options.peak else "peak unknown: --peak says it, and MFU is printed"
    print(f"{card}, {peak}; torch {torch.__version__}; {options.packs} x {options.length:,} tokens a step")
    options.until = time.time() + 60 * options.minutes
    found, late = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, options)
        for number, group in enumerate(GROUPS):
            lines = run(number, folder, words, options) if time.time() < options.until else []
            if not any("seconds" in line for line in lines) and len({*map(str, lines)}) < len(SIDES):
                late.append(group)
                continue
            found += cells(number, lines, options)
            for cell in found[-len(SIDES) :]:
                print(json.dumps(cell), flush=True)
    table(found)
    skipped(found)
    if options.tiny:
        print("tiny: the losses are compared, the speeds mean nothing")
    if options.out:
        options.out.write_text("".join(json.dumps(cell) + "\n" for cell in found), encoding="utf-8")
    for tuning, packed, checkpointing in late:
        print(f"not reached in {options.minutes:g} minutes: {tuning}", end=", ")
        print(f"{'packed' if packed else 'padded'}, checkpointing {'on' if checkpointing else 'off'}")
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        chosen = settled(sys.argv[5:])
        chosen.until = float(sys.argv[4])
        work(int(sys.argv[2]), Path(sys.argv[3]), chosen)
    else:
        main(sys.argv[1:])
