"""Time and peak memory of `merge` against peft's `merge_and_unload`, on a random model of several shards.

    python benchmarks/merge.py [PAIRS] [PARAMETERS IN MILLIONS]     (default: 3 pairs, 300)

Both run in a fresh process each, in pairs whose order is reversed every time: read base and adapter, merge, write. The
merged tensors are compared first, bit by bit; then processor time, wall time, and the largest resident memory that is
no mapped file (`RssAnon`, sampled) are printed, each as the median of the pairs with the lowest and highest, and their
ratios. The proof of `merge`, which loads the whole model, is measured apart, once.
"""

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

HIDDEN, VOCABULARY, SHARD = 1024, 32000, "200MB"


def build(folder: Path, millions: int) -> None:
    """Write a random Llama in bfloat16, and an adapter on all its linear layers, as a finished run."""
    import json

    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl_sft.recipe import paths

    layer = 4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN
    layers = max(1, round((millions * 1e6 - 2 * VOCABULARY * HIDDEN) / layer))
    sizes = {
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=16)).to(torch.bfloat16)
    model.save_pretrained(folder / "base", max_shard_size=SHARD)
    model.name_or_path = model.config._name_or_path = str(folder / "base")
    adapted = get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    adapted.save_pretrained(folder / "run")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(paths.EMBEDDED / "tiny" / name, folder / "run")
    (folder / "run" / "run.json").write_text(json.dumps({"outcome": "done"}), encoding="utf-8")
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{count / 1e6:.0f} M parameters, {len(list((folder / 'base').glob('*.safetensors')))} shards")


def merge_ours(folder: Path) -> None:
    """Merge and write with this package, without the proof."""
    from trl_sft.serving import merge, trained_adapter

    merge.SHARD_BYTES = 200 * 10**6
    (folder / "ours").mkdir()
    merge.Merger(trained_adapter.find_adapter(folder / "run"), dtype=None, base="original").write(folder / "ours")


def merge_peft(folder: Path) -> None:
    """Merge and write with peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "run").merge_and_unload().save_pretrained(folder / "peft")


def prove(folder: Path) -> None:
    """Run the whole command."""
    from trl_sft import cli

    assert cli.main(["merge", str(folder / "run"), "-o", str(folder / "whole")]) == 0


PARTS = {"build": build, "ours": merge_ours, "peft": merge_peft, "proof": prove}


def measure(part: str, folder: Path) -> None:
    """Run one part in this process and print its wall time and memory, both without the imports."""
    import peft
    import transformers
    import trl

    assert peft, (transformers, trl)
    largest, done = [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.005):
            largest[0] = max(largest[0], read_memory())

    before, begin, used = read_memory(), time.perf_counter(), time.process_time()
    thread = threading.Thread(target=sample)
    thread.start()
    PARTS[part](folder)
    seconds, processor = time.perf_counter() - begin, time.process_time() - used
    done.set()
    thread.join()
    print(f"measured {processor} {seconds} {(largest[0] - before) / 2**20}")


def read_memory() -> int:
    """Return the resident memory of this process that is no mapped file, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def run_part(part: str, folder: Path) -> list[float]:
    """Run one part in a fresh process; return processor time and wall time in seconds, and memory in MiB."""
    for name in ("ours", "peft", "whole"):
        if name == part or (name, part) == ("whole", "proof"):
            shutil.rmtree(folder / name, ignore_errors=True)
    command = [sys.executable, __file__, part, str(folder)]
    output = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ).stdout
    line = next(line for line in output.splitlines() if line.startswith("measured"))
    return [float(word) for word in line.split()[1:]]


def _load(folder: Path) -> dict[str, Any]:
    """Return the tensors of a folder."""
    from safetensors.torch import load_file

    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def compare(folder: Path) -> None:
    """Compare the tensors of both folders."""
    import torch

    ours, theirs = (_load(folder / name) for name in ("ours", "peft"))
    assert set(ours) == set(theirs)
    equal = sum(torch.equal(ours[name], theirs[name]) for name in ours)
    print(f"{equal} of {len(ours)} tensors equal bit by bit")
    assert equal == len(ours)


def describe(values: list[float], digits: int) -> str:
    """Return the median with the lowest and highest value."""
    numbers = [f"{number:,.{digits}f}" for number in (statistics.median(values), min(values), max(values))]
    return f"{numbers[0]} ({numbers[1]} to {numbers[2]})"


def main() -> None:
    """Build, measure both in pairs, compare, print."""
    if len(sys.argv) > 2 and sys.argv[1] in PARTS:
        measure(sys.argv[1], Path(sys.argv[2]))
        return
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder, int(sys.argv[2]) if len(sys.argv) > 2 else 300)
        results: dict[str, list[list[float]]] = {"ours": [], "peft": []}
        for number in range(pairs):
            for part in ("ours", "peft") if number % 2 == 0 else ("peft", "ours"):
                results[part].append(run_part(part, folder))
            if number == 0:
                compare(folder)
        results["proof"] = [run_part("proof", folder)]
    names = (("processor s", 1), ("wall s", 1), ("peak MiB", 0))
    for part, rows in results.items():
        columns = [list(column) for column in zip(*rows, strict=True)]
        print(
            part, *(f"{name} {describe(column, n)}" for (name, n), column in zip(names, columns, strict=True)), sep="  "
        )
    for index, (name, _) in enumerate(names):
        ratios = [ours[index] / theirs[index] for ours, theirs in zip(results["ours"], results["peft"], strict=True)]
        print(f"ours / peft: {name} {describe(ratios, 2)}")


if __name__ == "__main__":
    main()
