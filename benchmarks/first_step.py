"""From Enter to the first optimizer step of the quickstart, against the bare time of what it cannot do without.

    python benchmarks/first_step.py [PAIRS]

"bare" imports torch and trl's SFTTrainer and loads the quickstart's model and tokenizer, and ends. Ours runs the
recipe as it stands and ends when its first optimizer step is done: rows read, formatted, masked, checked and packed,
model loaded. "prepared" finds the tokens in the cache, as a second run does; "unprepared" has an empty cache, as a
first one. Without `evaluate:` the steps begin at once; with it the base model answers the held-out prompts first, so
that tuning can be compared with it: that is work, and it is printed apart. "as it comes" has all of it: an empty
cache, and the base model evaluated.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY = ROOT / "trl_sft" / "embedded" / "tiny"
BARE = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer
AutoModelForCausalLM.from_pretrained({str(TINY)!r})
AutoTokenizer.from_pretrained({str(TINY)!r})
"""
# A thread waits for torch, and ends the process after the first step of an optimizer.
OURS = """
import os, sys, threading, time
def watch():
    while not getattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook", None):
        time.sleep(0.02)
    sys.modules["torch.optim.optimizer"].register_optimizer_step_post_hook(lambda *_: os._exit(0))
threading.Thread(target=watch, daemon=True).start()
from trl_sft.cli import main
sys.exit(main(sys.argv[1:]) or 1)
"""
SIDES = ("bare", "prepared", "unprepared", "prepared, base model evaluated first", "as it comes")


def run(side, warm):
    """Return the seconds of one run; `warm` holds a cache that was filled before."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = [str(ROOT / "recipes" / "quickstart.yaml"), f"train.output_dir={folder}/out"]
        evaluated = side.endswith(("evaluated first", "as it comes"))
        more = [] if evaluated else ["evaluate=false", "train.eval_on_start=false"]
        command = ["-c", BARE] if side == "bare" else ["-c", OURS, *recipe, *more]
        cache = folder if side in ("unprepared", "as it comes") else warm
        env = os.environ | {"HF_HOME": cache, "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        began = time.perf_counter()
        done = subprocess.run([sys.executable, *command], check=False, capture_output=True, text=True, env=env)
        seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{side}: {(done.stdout + done.stderr)[-3000:]}")
    return seconds


def main(pairs):
    with tempfile.TemporaryDirectory() as warm:
        for side in SIDES:  # the disk's cache, and the tokens'
            run(side, warm)
        found = {side: [] for side in SIDES}
        for n in range(pairs):
            for side in SIDES[:: 1 if n % 2 == 0 else -1]:
                found[side].append(run(side, warm))
    for side in SIDES:
        ratios = sorted(a / b for a, b in zip(found[side], found["bare"], strict=True))
        spread = f"{statistics.median(ratios):.2f} times the bare time ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{side}: {statistics.median(found[side]):.2f} s, {spread}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
