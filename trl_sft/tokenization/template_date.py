"""The date that a chat template writes, pinned for a run: the rows have the same tokens on each day that it resumes.

Inputs: a tokenizer, a day. Outputs: templates that call `strftime_now` render that day, at 00:00.
The function that templates call reads `datetime.now()` in `transformers.utils.chat_template_utils`. There the name
`datetime` is replaced by a subclass whose `now` is the pinned day; written for transformers 5.17 to 5.23
(`_compile_jinja_template`), and tests/tokenization/test_template_date.py fails when upstream changes it. A keyword of
the template cannot replace it: upstream passes plain data only.
Not here: which day it is (`recipe.folder_decision`).
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from trl_sft.tokenization import chat_template

_FUNCTION = "strftime_now"
# two moments that differ in every part that a template may write
_PROBES = (datetime.datetime(2001, 2, 3, 4, 5, 6), datetime.datetime(2012, 11, 20, 19, 18, 17))
_DATE_KEYWORD = "date_string"  # read by the templates of Llama 3 before they call the function


def pin(moment: datetime.datetime | datetime.date | None) -> None:
    """Let templates write this moment, a day at 00:00, in this process; None = the time of the clock again."""
    if moment is None:
        chat_template_utils.datetime = datetime.datetime
        return
    if not isinstance(moment, datetime.datetime):
        moment = datetime.datetime.combine(moment, datetime.time())
    pinned = moment

    class PinnedDatetime(datetime.datetime):
        """`datetime` whose `now` is the pinned moment."""

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return pinned.replace(tzinfo=tz)

    chat_template_utils.datetime = PinnedDatetime


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Restore, after the block, what templates write now."""
    before = chat_template_utils.datetime
    try:
        yield
    finally:
        chat_template_utils.datetime = before


def writes_date(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any]) -> bool:
    """Tell whether the template renders the same chat differently at another time, with these keywords."""
    if _FUNCTION not in str(tokenizer.chat_template):
        return False
    renderings = []
    with restored():
        for moment in _PROBES:
            pin(moment)
            renderings.append(chat_template.render_all_trials(tokenizer, kwargs))
    return renderings[0] != renderings[1]


def describe(tokenizer: PreTrainedTokenizerBase, day: datetime.date, *, is_earlier: bool) -> str:
    """Return the line of the screen about the pinned day; `is_earlier`: it is that of the run that goes on."""
    origin = "the day on which this run began" if is_earlier else "today, also when this run resumes"
    line = f"the chat template writes a date: {day.isoformat()}, {origin}; at inference it writes the date of that day"
    if _DATE_KEYWORD in str(tokenizer.chat_template):
        line += f". To choose it, set tokenizer.chat_template_kwargs: {{{_DATE_KEYWORD}: '{day:%d %b %Y}'}}"
    return line
