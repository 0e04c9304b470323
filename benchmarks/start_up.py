"""Times the start: `--help`, and `check RECIPE --fast` (the strict reading of a recipe), against upstream.

    python benchmarks/start_up.py [PAIRS]

Each pair runs both commands in fresh processes, in alternating order; medians and the ratio are printed. Then come the
numbers of modules that each command has imported when it ends; `tests/cli/test_start_up.py` fixes which they are.
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
HELP = [PYTHON, "-m", "trl_sft", "--help"]
CHECK_FAST = [PYTHON, "-m", "trl_sft", "check", str(RECIPE), "--fast"]
PAIRS = {
    "trl_sft --help / trl --help": (HELP, [str(Path(PYTHON).parent / "trl"), "--help"]),
    "trl_sft --help / python -c pass": (HELP, [PYTHON, "-c", "pass"]),
    "trl_sft check RECIPE --fast / from trl import SFTConfig": (
        CHECK_FAST,
        [PYTHON, "-c", "from trl import SFTConfig"],
    ),
}
# runs a command of trl_sft in this process
RUN_COMMAND = """
import contextlib, io, sys
from trl_sft.cli import main
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    assert not main(sys.argv[1:])
"""
PRINT_MODULES = "import sys; print(len(sys.modules), *('torch' in sys.modules, 'trl' in sys.modules))"
ONE_STEP = ["train.max_steps=1", "evaluate=false", "train.eval_on_start=false", "train.eval_strategy=no"]


def count_modules(code, *words):
    """Return how many modules code has imported when it ends, and whether torch and trl are among them."""
    command = [PYTHON, "-c", f"{code}\n{PRINT_MODULES}", *words]
    process = subprocess.run(command, check=True, capture_output=True, text=True)
    number, torch, trl = process.stdout.strip().splitlines()[-1].split()
    return int(number), [name for name, imported in (("torch", torch), ("trl", trl)) if imported == "True"]


def print_module_counts():
    """Print the modules of each command, in fresh processes."""
    with tempfile.TemporaryDirectory() as folder:
        run = [str(RECIPE), f"train.output_dir={folder}/out"]
        commands = {"python alone": ("pass",), "trl_sft --help": (RUN_COMMAND, "--help")}
        commands["check RECIPE --fast"] = (RUN_COMMAND, "check", str(RECIPE), "--fast")
        commands["explain train.packing"] = (RUN_COMMAND, "explain", "train.packing")
        commands |= {name: (RUN_COMMAND, name, *run) for name in ("preview", "prepare", "check")}
        commands["a run of one step"] = (RUN_COMMAND, *run, *ONE_STEP)
        commands["import torch and trl, load the model"] = (first_step.IMPORTS,)
        for name, words in commands.items():
            number, heavy = count_modules(*words)
            print(f"{name}: {number:,} modules" + (f", with {' and '.join(heavy)}" if heavy else ""))


def time_command(command):
    """Return the wall seconds of one run of a command that has to succeed."""
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


def main(pairs):
    """Print the times and ratios, then the numbers of modules."""
    for name, commands in PAIRS.items():
        for command in commands:
            time_command(command)  # warm the disk cache
        times = ([], [])
        for n in range(pairs):
            for side in (0, 1) if n % 2 == 0 else (1, 0):
                times[side].append(time_command(commands[side]))
        first, second = (statistics.median(side) for side in times)
        ratios = sorted(a / b for a, b in zip(*times, strict=True))
        print(f"{name}: {first:.3f} s / {second:.3f} s, ratio {statistics.median(ratios):.3f}", end=" ")
        print(f"({ratios[0]:.3f} to {ratios[-1]:.3f}, {pairs} pairs)")
    print_module_counts()


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
