"""The whole message of a library that could not read a source, kept in a file that the fault names.

Inputs: an exception. Outputs: a log file in the cache of `datasets`, with the message and its traceback. It is not in
the run folder, which does not exist when rows are read for the first time. Deliberately not here: the fault itself.
"""

from __future__ import annotations

import hashlib
import re
import traceback
from pathlib import Path

import datasets

from trl_sft import redaction

_PACKAGE = Path(__file__).parents[2]
FOLDER = "trl_sft_messages"  # in the cache of `datasets`


def keep_message(name: str, error: BaseException) -> str:
    """Write the message of an exception, with its causes and traceback, to a file; return a sentence that names it.

    Args:
        name: the name of the source.
        error: what the library raised.

    Returns:
        "" = a line of this package raised it, whose message the fault has already, or the file could not be written.

    """
    frames = traceback.extract_tb(error.__traceback__)
    if frames and Path(frames[-1].filename).is_relative_to(_PACKAGE) and error.__cause__ is None:
        return ""
    text = "".join(traceback.format_exception(error))
    text = redaction.redact_shapes(text)
    digest = hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()[:8]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / FOLDER
    path = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', name)[-60:]}-{digest}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return f"The whole message is in {path}."
