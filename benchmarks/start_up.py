"""Start-up: `--help` and `check RECIPE --fast`, the strict reading of a recipe, against upstream's ways to the same.

    python benchmarks/start_up.py [PAIRS]

Each pair runs both in turn, order swapped each time, in fresh processes; medians and the ratio are printed. Then how
many modules each command has imported when it ends; `tests/cli/test_start_up.py` holds which.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import first_step

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PYTHON = sys.executable
OURS_HELP = [PYTHON, "-m", "trl_sft", "--help"]
OURS_READ = [PYTHON, "-m", "trl_sft", "check", str(RECIPE), "--fast"]
PAIRS = {
    "trl_sft --help / trl --help": (OURS_HELP, [str(Path(PYTHON).parent / "trl"), "--help"]),
    "trl_sft --help / python -c pass": (OURS_HELP, [PYTHON, "-c", "pass"]),
    "trl_sft check RECIPE --fast / from trl import SFTConfig": (OURS_READ, [PYTHON, "-c", "from trl import SFTConfig"]),
}
# runs a command of ours in this process, and counts at its end
COUNTED = """
import contextlib, io, sys
from trl_sft.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    assert not main(sys.argv[1:])
"""
COUNT = "import sys; print(len(sys.modules), *('torch' in sys.modules, 'trl' in sys.modules))"
STEP = ["train.max_steps=1", "evaluate=false", "train.eval_on_start=false", "train.eval_strategy=no"]


def modules(code, *words):
    """Return how many modules code has imported when it ends, and whether torch and trl are among them."""
    command = [PYTHON, "-c", f"{code}\n{COUNT}", *words]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    number, torch, trl = done.stdout.strip().splitlines()[-1].split()
    return int(number), [name for name, there in (("torch", torch), ("trl", trl)) if there == "True"]


def counts():
    """Print the modules of each command, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = [str(RECIPE), f"train.output_dir={folder}/out"]
        sides = {"python alone": ("pass",), "trl_sft --help": (COUNTED, "--help")}
        sides["check RECIPE --fast"] = (COUNTED, "check", str(RECIPE), "--fast")
        sides["explain train.packing"] = (COUNTED, "explain", "train.packing")
        sides |= {name: (COUNTED, name, *run) for name in ("preview", "prepare", "check")}
        sides["a run of one step"] = (COUNTED, *run, *STEP)
        sides["bare: import torch, trl, load the model"] = (first_step.BARE,)
        for name, words in sides.items():
            number, heavy = modules(*words)
            print(f"{name}: {number:,} modules" + (f", with {' and '.join(heavy)}" if heavy else ""))


def seconds(command):
    """Return the wall seconds of one run of a command that has to succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main(pairs):
    for name, commands in PAIRS.items():
        for command in commands:
            seconds(command)  # warm the disk cache
        times = ([], [])
        for n in range(pairs):
            for side in (0, 1) if n % 2 == 0 else (1, 0):
                times[side].append(seconds(commands[side]))
        ours, theirs = (statistics.median(side) for side in times)
        ratios = sorted(a / b for a, b in zip(*times, strict=True))
        print(f"{name}: {ours:.3f} s / {theirs:.3f} s, ratio {statistics.median(ratios):.3f}", end=" ")
        print(f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {pairs} pairs)")
    counts()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
