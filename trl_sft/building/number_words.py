"""Numbers of a text in one form, however they are written: 1,000 and 1000, fifty percent and 50%, 三个 and 3个.

Inputs: a text, English or Chinese. Outputs: the same text with figures in place of number words, and the numbers in it.
Chinese numerals count where they have several characters or stand before a measure word: 十分 ("very") is no number.
`one` is none either, because it is a pronoun too. Not here: what follows from a number that another text lacks.
"""

from __future__ import annotations

import re

_UNITS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: value for value, word in enumerate(_UNITS)} | {word: 10 * value for value, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 1_000_000, "billion": 1_000_000_000}
_WORD = "|".join(sorted([*_VALUES, *_SCALES], key=len, reverse=True))
_ENGLISH = re.compile(rf"\b(?:(?:a|{_WORD})(?:[- ]|\s+and\s+))*(?:{_WORD})\b", re.IGNORECASE)
_FRACTION = re.compile(
    r"\b(\d+|an?|one)[ -](half|halves|thirds?|quarters?|fourths?|fifths?|tenths?)\b|\bhalf\b", re.IGNORECASE
)
_PARTS = {"half": 2, "halv": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "tenth": 10}
_DOZEN = re.compile(r"\b(?:(\d+)|an?) dozen\b", re.IGNORECASE)
_PERCENT = re.compile(r"(\d[\d.,]*)\s*(?:percent|per cent|个百分点)", re.IGNORECASE)
_CHINESE_PERCENT = re.compile(r"百分之\s*(\d[\d.]*)")
_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_MONTH = re.compile(
    r"\b(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|sept?(?:ember)?|oct(?:ober)?"
    r"|nov(?:ember)?|dec(?:ember)?)\.?(?= \d)|(?<=\d )(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\b",
    re.IGNORECASE,
)
_DIGITS = {sign: value for value, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2}
_CHINESE_SCALES = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "亿": 100_000_000}
_MEASURES = (
    "个只条本张人元块岁年月日天时分秒米里厘斤克升次遍倍种名位件辆头匹棵朵袋箱盒瓶杯碗双对页章行层排列组步台部首支枝把片根家间座"
    "户口道题篇段份号期级度周星点位%吨公千毫"
)
_CHINESE = re.compile(rf"[零〇一二两三四五六七八九十百千万亿]{{2,}}|[二两三四五六七八九十](?=[{_MEASURES}])")
_NO_CHINESE = re.compile(r"十分(?![钟之])|千万(?=[不要别])|万一|一一|千百|百万(?=富翁)|三三两两|四面八方")
_LIST_MARK = re.compile(r"^\s*\d{1,2}[.)、]\s", re.MULTILINE)
_NEGATIVE = re.compile(r"(?:\bminus |负)(?=\d)", re.IGNORECASE)
_NUMBER = re.compile(r"(?<![A-Za-z\d.])(?:(?<![\w)] )(?<![\w)\]%])[-−])?\d+(?:[.,:/]\d+)*%?")


def list_numbers(text: str) -> list[str]:
    """Return the different numbers of a text in one form each, in order; the numbers of a list's entries are none.

    Example:
        >>> list_numbers("1. Take 1,000 g.  2. Wait thirty-five minutes; it grows by 50 percent.")
        ['1000', '2', '35', '50%']

    """
    text = write_figures(_LIST_MARK.sub(" ", text))
    return list(dict.fromkeys(_write_plainly(number) for number in _NUMBER.findall(text)))


def write_figures(text: str) -> str:
    """Return a text with figures in place of number words and of the names of months in dates."""
    text = _NO_CHINESE.sub(" ", text)
    text = _CHINESE.sub(lambda found: _read_chinese(found[0]), text)
    text = _ENGLISH.sub(lambda found: _read_english(found[0]), text)
    text = _DOZEN.sub(lambda found: str(12 * int(found[1] or 1)), text)
    text = _FRACTION.sub(_read_fraction, text)
    text = _PERCENT.sub(r"\1%", _CHINESE_PERCENT.sub(r"\1%", text))
    text = _MONTH.sub(lambda found: str(1 + _MONTHS.index((found[1] or found[2])[:3].lower())), text)
    return _NEGATIVE.sub(" -", text)


def _read_english(words: str) -> str:
    """Return the figures of number words; words that are no number (`one`, `a`) stay."""
    parts = re.findall(r"[a-z]+", words.lower())
    lead = ""
    if parts[0] in ("a", "and") and (len(parts) == 1 or parts[1] not in _SCALES):
        lead, parts = words.split(maxsplit=1)[0] + " ", parts[1:]
    if parts == ["one"] or not parts:
        return words
    total, current = 0, 0
    for part in parts:
        if part == "hundred":
            current = max(current, 1) * 100
        elif part in _SCALES:
            total, current = total + max(current, 1) * _SCALES[part], 0
        elif part == "a":
            current = 1
        elif part != "and":
            current += _VALUES[part]
    return f"{lead}{total + current}"


def _read_fraction(found: re.Match[str]) -> str:
    """Return a fraction in figures."""
    name = (found[2] or "half").lower()
    below = next(value for start, value in _PARTS.items() if name.startswith(start))
    above = found[1] if found[1] and found[1].isdigit() else "1"
    return f"{above}/{below}"


def _read_chinese(numeral: str) -> str:
    """Return the figures of a Chinese numeral: 一百二十 is 120, 二〇二四 is 2024."""
    if not any(sign in _CHINESE_SCALES for sign in numeral):
        return "".join(str(_DIGITS[sign]) for sign in numeral)
    total, section, digit = 0, 0, 0
    for sign in numeral:
        if sign in _DIGITS:
            digit = _DIGITS[sign]
        elif _CHINESE_SCALES[sign] >= _CHINESE_SCALES["万"]:
            total, section, digit = (total + section + digit or 1) * _CHINESE_SCALES[sign], 0, 0
        else:
            section, digit = section + (digit or 1) * _CHINESE_SCALES[sign], 0
    return str(total + section + digit)


def _write_plainly(number: str) -> str:
    """Return a number without commas, leading zeros, and zeros at the end of its decimals; times and versions stay."""
    number = re.sub(r",(?=\d{3}(?!\d))", "", number.replace("−", "-"))
    sign, digits, percent = number.startswith("-") * "-", number.strip("-%"), number.endswith("%") * "%"
    if digits.isdecimal():
        digits = str(int(digits)) if len(digits) < _MOST_DIGITS else digits
    elif digits.count(".") == 1 and not any(other in digits for other in ",:/"):
        digits = digits.rstrip("0").rstrip(".")
    return sign + digits + percent


_MOST_DIGITS = 100  # of a number whose leading zeros are removed
