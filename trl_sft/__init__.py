"""trl_sft: a YAML recipe becomes a run of TRL's SFTTrainer.

from trl_sft import load_recipe, train

result = train(load_recipe("recipe.yaml", ["train.max_steps=10"]))
result.metrics["eval_loss"]
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trl_sft.cli.preview.rows import Preview
    from trl_sft.recipe.checked import Run
    from trl_sft.training.finish import Result

__version__ = "0.1.0"
__all__ = ["__version__", "load_recipe", "show", "train"]


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Run:
    """Read and check a recipe; nothing is loaded and no torch is imported.

    `overrides` are words as on the command line, `section.key=value`. Raises
    `trl_sft.errors.RecipeError` with every fault at once.
    """
    from trl_sft.recipe import build, yaml_reader

    return build.build_run(yaml_reader.read_recipe(path, [overrides] if isinstance(overrides, str) else overrides))


def show(run: Run, num_rows: int = 3) -> Preview:
    """Return the first rows of each source as the model sees them; a notebook shows them in colour.

    Needs no weights. Raises `trl_sft.errors.UserError`.
    """
    from trl_sft import upstream_warnings

    with upstream_warnings.quiet():
        from trl_sft.cli.preview import rows

        return rows.build_preview(run, num_rows)


def train(run: Run) -> Result:
    """Carry out what `load_recipe` returned: load, format, train, evaluate, save.

    Returns the folder, the number of steps and the metrics of the held-out rows. Raises
    `trl_sft.errors.UserError` before training and `trl_sft.errors.RunStopped` when it ends early.
    """
    from trl_sft import upstream_warnings
    from trl_sft.recipe import resolved

    claim = resolved.claim_folder(run)  # before the imports, which take seconds
    # Large tensors on a CPU in pages of 2 MB: without them a step waits for the kernel to clear its 4 KB pages one by
    # one (benchmarks/step.py). torch asks the kernel where this is set before its first tensor; Linux alone has it.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    with upstream_warnings.quiet():
        from trl_sft.training import run as training_run

        return training_run.run(run, claim)
