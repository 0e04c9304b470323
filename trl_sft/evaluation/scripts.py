"""The script that a text is written in, as a stand-in for its language.

Inputs: a text. Outputs: the name of a script. Languages of one script, such as English and French, are not told apart:
that needs a model, and the ones that need none are unreliable on short texts. Not here: which script is expected
(`answer_format`).
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter

LEAST_LETTERS = 4  # fewer say nothing: "x = 3", "GPT-4"
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]+`|https?://\S+", re.DOTALL)  # of every language alike
_JAPANESE_SHARE = 0.1  # of kana among letters, from which Chinese characters are Japanese
_HAN_WEIGHT = 3  # one Chinese character stands for about as much as three Latin letters
# the first word of a character's Unicode name -> its script
_SCRIPTS = {
    "CJK": "han",
    "HIRAGANA": "kana",
    "KATAKANA": "kana",
    "HANGUL": "hangul",
    **{
        name.upper(): name
        for name in ("latin", "cyrillic", "greek", "arabic", "hebrew", "devanagari", "bengali", "tamil", "thai")
    },
}


def find_script(text: str) -> str:
    """Return the script of most letters: `han`, `latin`, `japanese`, ...; "" for fewer than four letters.

    Code in fences or backticks and addresses do not count. A Chinese character counts as three letters, so that a
    Chinese sentence with an English name is Chinese.

    Example:
        >>> find_script("请用 Python 写一个函数")
        'han'

    """
    counts: dict[str, int] = {}
    for letter, number in Counter(_CODE.sub(" ", text)).items():
        if letter.isalpha():
            script = _SCRIPTS.get(unicodedata.name(letter, "").split(" ")[0].split("-")[0], "other")
            weight = _HAN_WEIGHT if script in ("han", "kana", "hangul") else 1
            counts[script] = counts.get(script, 0) + number * weight
    kana = counts.pop("kana", 0)
    if kana >= _JAPANESE_SHARE * (kana + sum(counts.values())) and kana:
        counts["japanese"] = kana + counts.pop("han", 0)
    elif kana:
        counts["han"] = counts.get("han", 0) + kana
    if sum(counts.values()) < LEAST_LETTERS:
        return ""
    return max(counts, key=lambda script: counts[script])
