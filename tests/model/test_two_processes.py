"""With several processes the loss is seen by DDP: all of them end with one model, that of one process."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trl_sft.model import patches
from trl_sft.recipe import paths

SCRIPT = Path(__file__).with_name("two_processes.py")


def carry_out(folder, number, *words):
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={number}", "--master_port=29533"]
    done = subprocess.run(
        [*command, SCRIPT, folder, paths.EMBEDDED / "tiny", *words], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(file) for file in sorted(folder.glob(f"rank*-of-{number}.pt"))]


@pytest.mark.long
@pytest.mark.skipif(not patches.expects_fused_head(), reason="this TRL is older than its fused head")
@pytest.mark.parametrize("packing", ["0", "1"])
def test_two_processes_end_with_one_model_which_is_that_of_one_process(packing, tmp_path):
    two = carry_out(tmp_path, 2, "2", "1", packing)
    (one,) = carry_out(tmp_path, 1, "2", "2", packing)
    assert len(two) == 2
    for name, weight in two[0][0].items():
        assert torch.equal(weight, two[1][0][name]), f"{name} differs between the processes"
    far = max(float((w - one[0][n]).abs().max() / one[0][n].abs().max()) for n, w in two[0][0].items())
    print(f"one process and two: weights differ by {far:.1e} at most, losses {one[1][-1]} and {two[0][1][-1]}")
    assert far < 1e-5
    assert two[0][1] == pytest.approx(one[1], rel=1e-5)


@pytest.mark.long
@pytest.mark.skipif(not patches.expects_fused_head(), reason="this TRL is older than its fused head")
def test_two_processes_train_the_same_with_and_without_the_probe_of_time(tmp_path):
    plain = carry_out(tmp_path, 2, "2", "1", "0")
    probed = carry_out(tmp_path, 2, "2", "1", "0", "1")
    assert [process[1] for process in probed] == [process[1] for process in plain]
    assert all(torch.equal(weight, plain[0][0][name]) for name, weight in probed[0][0].items())
    ((low, seconds, high),) = probed[0][2]
    assert probed[1][2] == probed[0][2]  # the slowest process decides for both
    assert 0 < low < seconds < high
