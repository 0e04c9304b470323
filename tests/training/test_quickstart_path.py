"""How much of this package the quickstart passes before `trainer.train()`."""

import json
import subprocess
import sys
from pathlib import Path

# Measured on 2026-11-26. The numbers may fall, and rise only with a reason in the log; the architecture page says why
# they are not lower. The floors are there because a profile that sees nothing proves nothing.
LIMITS = {
    "modules": (40, 115),
    "calls_between_modules": (60, 204),
    "functions": (200, 630),
    "statements": (1500, 5010),
    "lines": (2000, 6680),
}


def test_quickstart_passes_no_more_modules_and_lines_than_measured():
    script = Path(__file__).with_name("quickstart_path.py")
    root = script.parents[2]
    done = subprocess.run([sys.executable, script], cwd=root, capture_output=True, text=True, check=True)
    counts = json.loads(done.stdout.splitlines()[-1])
    print(f"The quickstart passes {counts}")
    assert {name: counts[name] for name, (low, high) in LIMITS.items() if not low <= counts[name] <= high} == {}
