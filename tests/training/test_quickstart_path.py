"""How much of our code the quickstart passes before `trainer.train()`: few modules, few lines."""

import json
import subprocess
import sys
from pathlib import Path


def test_quickstart_passes_few_modules_and_lines_before_training():
    script = Path(__file__).with_name("quickstart_path.py")
    root = script.parents[2]
    done = subprocess.run([sys.executable, script], cwd=root, capture_output=True, text=True, check=True)
    counted = json.loads(done.stdout.splitlines()[-1])
    print(f"The quickstart passes {counted}")
    # floors: a profile that sees nothing proves nothing
    assert 20 <= counted["modules"] <= 52, counted
    assert 1000 <= counted["lines"] <= 3120, counted
