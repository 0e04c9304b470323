"""Measures a training step on a GPU: tokens/s, MFU and memory for ways to tune, to attend and to compute the loss.

    python benchmarks/gpu.py [--minutes 8] [--pairs 3] [--steps 8] [--peak TFLOPS] [--out FILE.jsonl]
    python benchmarks/gpu.py --device cpu --tiny     every line of it on a small scale, without a GPU

The model has the shape of Qwen2.5-0.5B and random weights; it and its tokenizer are made here. The rows are 8 packs of
2,048 tokens with 4 documents each, or the same 32 documents padded; every token has a label. A group is one way to tune
(all weights, LoRA, LoRA on 8-bit and 4-bit weights), packed or padded, with gradient checkpointing or without. The
sides of a group differ in attention (sdpa, trl_sft's attention by document, flex_attention, flash_attention_2, a kernel
of the hub) and in loss (TRL's, trl_sft's); "sdpa, trl" is plain SFTTrainer. The sides of a group run in one fresh
process, in turn, in alternating order, PAIRS times; the time of a step is the median of all but the first two. Losses
are compared first, for the same batches in the same order, and a side whose losses differ gets no ratio. The most
interesting groups come first; groups that --minutes did not reach are listed.

MFU is FLOPs by time by the peak of the card; `mfu.py` has the formula, the peaks and their sources.
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

from mfu import DOCUMENTS, PEAKS, SHAPE, TINY, build_model, build_rows, count_flops

FULL, LORA, EIGHT, FOUR = "full", "lora", "lora 8-bit", "lora 4-bit"
# (tuning, packed, checkpointing), the most interesting first
GROUPS = [(FULL, True, False), (LORA, True, False), (FOUR, True, False), (FULL, True, True), (EIGHT, True, False)]
GROUPS += [(FULL, False, False), (LORA, False, False), (LORA, True, True), (FOUR, False, False), (EIGHT, False, False)]
GROUPS += [(FULL, False, True), (FOUR, True, True), (EIGHT, True, True), (LORA, False, True), (FOUR, False, True)]
GROUPS += [(EIGHT, False, True)]
PLAIN = ("sdpa", "trl")
SIDES = [PLAIN, ("documents", "trl_sft"), ("sdpa", "trl_sft"), ("documents", "trl"), ("flash_attention_2", "trl")]
SIDES += [("flex_attention", "trl"), ("kernels-community/flash-attn2", "trl")]
WARM_UP = 2  # steps that do not count
GRACE = 60  # seconds that a group may take beyond --minutes


def explain_skip(side, group, options):
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
    if loss == "trl_sft":
        from trl_sft.model import cpu_loss

        return "" if cpu_loss.AVAILABLE else "this TRL has no fused head that trl_sft could replace"
    return ""


def build_trainer(side, group, *, folder, options, callback):
    """Return SFTTrainer with the attention and the loss of a side."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    (attention, _), (tuning, packed, checkpointing) = side, group
    cuda = options.device == "cuda"
    packs, documents = build_rows(options)
    batch = options.packs if packed else options.packs * DOCUMENTS
    model_kwargs = {"dtype": "float32" if tuning == FULL or not cuda else "bfloat16"}  # as the recipes have it
    model_kwargs["attn_implementation"] = "sdpa" if attention == "documents" else attention
    args = SFTConfig(
        **{"output_dir": str(folder / "out"), "use_cpu": not cuda, "bf16": cuda, "report_to": "none", "seed": 1},
        **{"packing": packed, "max_length": options.length, "per_device_train_batch_size": batch},
        **{"max_steps": options.steps, "logging_steps": 1, "save_strategy": "no", "learning_rate": 1e-4},
        **{"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
        **{"dataset_kwargs": {"skip_prepare_dataset": True}, "train_sampling_strategy": "sequential"},
        **{"model_init_kwargs": model_kwargs, "dataloader_pin_memory": cuda, "disable_tqdm": True},
    )
    bits = {EIGHT: {"load_in_8bit": True}, FOUR: {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}}.get(tuning)
    if bits and tuning == FOUR:
        bits["bnb_4bit_compute_dtype"] = torch.bfloat16 if cuda else torch.float32
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    return SFTTrainer(
        **{"model": str(folder), "args": args, "callbacks": [callback]},
        train_dataset=Dataset.from_dict(packs if packed else documents),
        quantization_config=BitsAndBytesConfig(**bits) if bits else None,
        peft_config=None if tuning == FULL else lora,
    )


def install_parts(side, model):
    """Put the attention and the loss of a side into a model."""
    from trl.trainer import utils

    from trl_sft.model import cpu_loss, packed_attention, patches

    if side != PLAIN:
        patches.repair(model)  # as a run does; the test of the attention would pack 4-bit weights on a CPU
    if side[0] == "documents":
        assert packed_attention.install(model)
    if side[1] == "trl_sft":
        use_triton = utils._use_triton  # with Triton trl_sft keeps the loss of TRL; here the two are compared
        utils._use_triton = lambda _: False
        try:
            assert cpu_loss.install(model, cpu_loss.LOGITS_GIB)
        finally:
            utils._use_triton = use_triton


def measure_side(side, group, *, folder, options):
    """Train a few steps; return the median seconds of a step, the losses and the peak memory."""
    import torch
    from transformers import TrainerCallback

    cuda, times = options.device == "cuda", []

    def read_clock():
        torch.cuda.synchronize() if cuda else None
        return time.perf_counter()

    class StepTimer(TrainerCallback):
        def on_step_begin(self, *_, **__):
            self.began = read_clock()

        def on_step_end(self, *_, **__):
            times.append(read_clock() - self.began)

    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    trainer = build_trainer(side, group, folder=folder, options=options, callback=StepTimer())
    install_parts(side, trainer.model)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == len(times) == options.steps
    assert all(math.isfinite(loss) for loss in losses)
    gib = torch.cuda.max_memory_allocated() / 2**30 if cuda else None
    return {"seconds": statistics.median(times[min(WARM_UP, len(times) - 1) :]), "losses": losses, "gib": gib}


def measure_group(number, folder, options):
    """Measure the sides of one group in turn; print each run as a line of JSON."""
    group = GROUPS[number]
    sides = []
    for side in SIDES:
        reason = explain_skip(side, group, options)
        if reason:
            print(json.dumps({"side": side, "skipped": reason}), flush=True)
        else:
            sides.append(side)
    for n in range(options.pairs):
        for side in tuple(sides)[:: 1 if n % 2 == 0 else -1]:
            if time.time() > options.until:
                return
            try:
                line = measure_side(side, group, folder=folder, options=options)
            except Exception as error:  # too little memory, no kernel for this card: the other sides continue
                sides.remove(side)
                line = {"skipped": f"{type(error).__name__}: {(str(error).strip() or 'no text').splitlines()[0][:160]}"}
            print(json.dumps({"side": side} | line), flush=True)


def make_cells(number, lines, options):
    """Return the results of each side of a group, in order, with the ratio to SFTTrainer."""
    tuning, packed, checkpointing = GROUPS[number]
    group = {"tuning": tuning, "packed": packed, "checkpointing": checkpointing}
    cells = []
    plain = [line for line in lines if tuple(line["side"]) == PLAIN and "seconds" in line]
    for side in SIDES:
        side_lines = [line for line in lines if tuple(line["side"]) == side]
        runs = [line for line in side_lines if "seconds" in line]
        cell = group | {"attention": side[0], "loss": side[1], "runs": len(runs)}
        if not runs:
            cells.append(cell | {"skipped": side_lines[-1]["skipped"] if side_lines else "not reached"})
            continue
        seconds = statistics.median(run["seconds"] for run in runs)
        cell |= {"seconds": seconds, "tokens_per_second": round(options.packs * options.length / seconds)}
        cell["mfu"] = (
            count_flops(options, frozen=tuning != FULL) / seconds / (options.peak * 1e12) if options.peak else None
        )
        memory = [run["gib"] for run in runs if run["gib"]]
        cell |= {"gib": max(memory) if memory else None, "losses": runs[0]["losses"]}
        if plain:
            pairs = zip(runs[0]["losses"], plain[0]["losses"], strict=True)
            cell["differs"] = max(abs(a - b) / abs(b) for a, b in pairs)
            # bfloat16 has 8 bits: differences by rounding alone stay below this
            equal = cell["differs"] < (2e-2 if options.device == "cuda" else 1e-4)
            base = statistics.median(run["seconds"] for run in plain)
            cell["ratio"] = base / seconds if equal else None
        cells.append(cell)
    return cells


def print_table(cells):
    """Print the results, a line for each side."""
    print(f"{'tuning':<11}{'rows':<9}{'ckpt':<6}{'attention':<31}{'loss':<9}{'tokens/s':>10}{'MFU':>7}", end="")
    print(f"{'GiB':>7}  {'losses':<19}{'differ by':>10}  times SFTTrainer's speed")
    for cell in (cell for cell in cells if "skipped" not in cell):
        rows, checkpointing = ("packed" if cell["packed"] else "padded"), ("yes" if cell["checkpointing"] else "no")
        print(f"{cell['tuning']:<11}{rows:<9}{checkpointing:<6}{cell['attention']:<31}{cell['loss']:<9}", end="")
        mfu, gib = (f"{cell['mfu']:.1%}" if cell["mfu"] else "-"), (f"{cell['gib']:.1f}" if cell["gib"] else "-")
        losses = f"{cell['losses'][0]:.4f} to {cell['losses'][-1]:.4f}"
        reason = "losses differ" if "differs" in cell else "SFTTrainer did not run"
        ratio = f"{cell['ratio']:.2f}" if cell.get("ratio") else f"none: {reason}"
        print(f"{cell['tokens_per_second']:>10,}{mfu:>7}{gib:>7}  {losses:<19}{cell.get('differs', 0):>10.1e}  {ratio}")


def print_skipped(cells):
    """Print the sides that did not run, each reason once."""
    reasons = {}
    for cell in (cell for cell in cells if "skipped" in cell):
        groups = reasons.setdefault((f"{cell['attention']}, {cell['loss']}", cell["skipped"]), [])
        groups.append(f"{cell['tuning']} {'packed' if cell['packed'] else 'padded'}")
    for (side, reason), groups in reasons.items():
        print(f"skipped: {side}: {reason} ({', '.join(dict.fromkeys(groups))})")


def run_group(number, folder, *, words, options):
    """Run one group in a fresh process; return its lines."""
    environment = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, __file__, "--work", str(number), str(folder), str(options.until), *words]
    output, errors = folder / "stdout", folder / "stderr"
    with output.open("w") as stdout, errors.open("w") as stderr:
        streams = {"stdout": stdout, "stderr": stderr, "env": environment | os.environ}
        try:
            seconds = max(options.until - time.time(), 0) + GRACE
            code = subprocess.run(command, check=False, timeout=seconds, **streams).returncode
        except subprocess.TimeoutExpired:
            code = 0
    lines = [json.loads(line) for line in output.read_text().splitlines() if line.startswith('{"side"')]
    if code:
        last = (errors.read_text().strip().splitlines() or ["no text"])[-1][:200]
        lines += [{"side": side, "skipped": f"the process ended with {code}: {last}"} for side in SIDES]
    return lines


def parse_options(words):
    """Return the options, and the values that follow from them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--peak", type=float, help="TFLOPS of the card in bfloat16, dense")
    parser.add_argument("--out", type=Path, help="write the results as lines of JSON")
    options = parser.parse_args(words)
    options.shape = TINY if options.tiny else SHAPE
    options.packs, options.length = (2, 128) if options.tiny else (8, 2048)
    options.steps, options.pairs = (2, 1) if options.tiny else (options.steps, options.pairs)
    return options


def main(words):
    """Measure all groups that --minutes allow; print the results."""
    import torch

    options = parse_options(words)
    if options.device == "cuda" and not torch.cuda.is_available():
        return print("skipped: no CUDA device")
    card = torch.cuda.get_device_name() if options.device == "cuda" else "CPU"
    options.peak = options.peak or next((peak for name, peak in PEAKS.items() if name in card), None)
    peak = f"{options.peak:g} TFLOPS" if options.peak else "peak unknown: set --peak to print MFU"
    print(f"{card}, {peak}; torch {torch.__version__}; {options.packs} x {options.length:,} tokens a step")
    options.until = time.time() + 60 * options.minutes
    cells, late_groups = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build_model(folder, options)
        for number, group in enumerate(GROUPS):
            lines = run_group(number, folder, words=words, options=options) if time.time() < options.until else []
            if not any("seconds" in line for line in lines) and len({*map(str, lines)}) < len(SIDES):
                late_groups.append(group)
                continue
            cells += make_cells(number, lines, options)
            for cell in cells[-len(SIDES) :]:
                print(json.dumps(cell), flush=True)
    print_table(cells)
    print_skipped(cells)
    if options.tiny:
        print("tiny: the losses are compared, the speeds mean nothing")
    if options.out:
        options.out.write_text("".join(json.dumps(cell) + "\n" for cell in cells), encoding="utf-8")
    for tuning, packed, checkpointing in late_groups:
        print(f"not reached in {options.minutes:g} minutes: {tuning}", end=", ")
        print(f"{'packed' if packed else 'padded'}, checkpointing {'on' if checkpointing else 'off'}")
    return None


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        options = parse_options(sys.argv[5:])
        options.until = float(sys.argv[4])
        measure_group(int(sys.argv[2]), Path(sys.argv[3]), options)
    else:
        main(sys.argv[1:])
