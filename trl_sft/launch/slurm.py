"""The sbatch file of a launch: SLURM starts the same command on each host.

Inputs: a `LaunchPlan`. Output: a text. Not here: submitting it.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from trl_sft.launch.plan import LaunchPlan

_NOTICE = 300  # seconds before the time limit, in which the run saves a checkpoint


def write_batch_file(plan: LaunchPlan, *, uses_cards: bool, folder: Path, python: str) -> str:
    """Return the text of an sbatch file that runs a plan.

    Args:
        plan: of one host; SLURM says which host is which.
        uses_cards: whether each process has a card.
        folder: where the job runs.
        python: the command that starts Python there.

    """
    arguments = shlex.join(plan.arguments)
    port = plan.port
    launch = f"{python} -m trl_sft launch {arguments} --processes {plan.processes} --hosts {plan.hosts}"
    meeting = f'--host-rank "$SLURM_NODEID" --host "$MASTER" --port {port}' if plan.hosts > 1 else ""
    cards = f"#SBATCH --gpus-per-node={plan.processes}\n" if uses_cards else ""
    return f"""#!/bin/bash
#SBATCH --job-name={Path(plan.arguments[0]).stem}
#SBATCH --nodes={plan.hosts}
#SBATCH --ntasks-per-node=1
{cards}#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@{_NOTICE}
#SBATCH --requeue
# {_NOTICE} seconds before the time limit SIGUSR1 reaches the run: it saves a checkpoint and ends with 138.
# The same job, submitted again, resumes.
cd {shlex.quote(str(folder))} || exit 2
export MASTER=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --kill-on-bad-exit=1 bash -c {shlex.quote(f"exec {launch} {meeting}".strip())}
"""
