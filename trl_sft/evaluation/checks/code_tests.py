"""The check `code`: the code of an answer runs, with the tests of the row after it.

Inputs: a `CheckedAnswer` whose parameters have `tests`. Outputs: 1.0 or 0.0. The code is that of the last code block
of the answer, or the whole answer where it has none. Not here: the limits under which it runs (`sandbox`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from trl_sft.evaluation.checks import sandbox
from trl_sft.evaluation.checks.answer import CheckedAnswer

_BLOCK = re.compile(r"```(?:python|py|python3)?[ \t]*\r?\n(.*?)(?:```|\Z)", re.DOTALL | re.IGNORECASE)


def check_code(checked: CheckedAnswer) -> float:
    """Return 1 if the code of the answer and the tests of the row run to their end without an error."""
    code = extract_code(checked.answer)
    if not code.strip():
        return 0.0
    tests = checked.parameters.get("tests", "") if isinstance(checked.parameters, Mapping) else ""
    return float(sandbox.run_code(f"{code}\n\n{tests}").is_done)


def extract_code(answer: str) -> str:
    """Return the code of an answer: its last code block, or the whole answer."""
    blocks = _BLOCK.findall(answer)
    return str(blocks[-1]) if blocks else answer
