"""Start-up: `--help` and `check RECIPE --fast`, the strict reading of a recipe, against upstream's ways to the same.

    python benchmarks/start_up.py [PAIRS]

Each pair runs both in turn, order swapped each time, in fresh processes; medians and the ratio are printed.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart.yaml"
PYTHON = sys.executable
OURS_HELP = [PYTHON, "-m", "trl_sft", "--help"]
OURS_READ = [PYTHON, "-m", "trl_sft", "check", str(RECIPE), "--fast"]
PAIRS = {
    "trl_sft --help / trl --help": (OURS_HELP, [str(Path(PYTHON).parent / "trl"), "--help"]),
    "trl_sft --help / python -c pass": (OURS_HELP, [PYTHON, "-c", "pass"]),
    "trl_sft check RECIPE --fast / from trl import SFTConfig": (OURS_READ, [PYTHON, "-c", "from trl import SFTConfig"]),
}


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


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 5)
