"""The packages of the extra `eval`, imported when a statistic or a check needs them.

Inputs: names of modules. Outputs: nothing, or one fault with the line for pip. Not here: packages that keys of a recipe
need (`model.needed_packages`).
"""

from __future__ import annotations

import importlib.util
import shlex

from trl_sft.errors import Fault, MissingPackage

EXTRA = "trl-sft[eval]"  # pyproject.toml: jsonschema, sacrebleu, scipy and statsmodels in tested versions
SUITES_EXTRA = "trl-sft[suites]"  # has lm-eval
SERVE_EXTRA = "trl-sft[serve]"  # has the client `openai`
JUDGE_EXTRA = "trl-sft[judge]"  # the client, and what intervals need
STATISTICS = ("scipy", "statsmodels")


def require_packages(where: str, *names: str, extra: str = EXTRA) -> None:
    """Refuse to go on without a package.

    Args:
        where: what needs it, as the message names it.
        names: of modules, each of them needed.
        extra: of trl_sft, which has them.

    Raises:
        MissingPackage: with one line for pip.

    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        problem = f"not installed: {', '.join(missing)}"
        fix = f"Run `pip install {shlex.quote(extra)}` in this Python environment."
        raise MissingPackage(Fault(where, problem, fix, code="package.missing"))
