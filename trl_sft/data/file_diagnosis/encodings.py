"""The encoding of a text file, decided by strict decoding and by how plausible the decoded text is.

Inputs: the bytes of a file. Outputs: candidates, the most plausible first, each with a sample of its text. The
candidates are offered to the user and never applied: several encodings decode almost any bytes. Deliberately not
here: reading the file, and what its text means.
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from typing import NamedTuple

# Python's name of the encoding after a byte order mark; UTF-32 first, because its mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Several bytes for a character first. Of two that give the same text the first one is offered.
_MULTI_BYTE = ("gbk", "gb18030", "big5", "cp950", "shift_jis", "cp932", "euc_jp", "cp949")
_MULTI_BYTE_FAMILIES = ("gb", "big5", "cp93", "cp94", "cp95", "shift", "euc", "iso2022", "johab", "hz")
_SINGLE_BYTE = ("cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp874", "koi8-r", "mac_roman")
_TITLES = {
    **{"utf-8-sig": "UTF-8 with a byte order mark", "utf-16": "UTF-16", "utf-16-le": "UTF-16", "utf-16-be": "UTF-16"},
    **{"utf-32": "UTF-32", "gbk": "GBK (Chinese)", "gb18030": "GB18030 (Chinese)", "big5": "Big5 (Chinese)"},
    **{"cp950": "Big5 (Chinese)", "shift_jis": "Shift-JIS (Japanese)", "cp932": "Shift-JIS (Japanese)"},
    **{"euc_jp": "EUC-JP (Japanese)", "cp949": "EUC-KR (Korean)", "cp1252": "Windows-1252 (Western European)"},
    **{"cp1250": "Windows-1250 (Central European)", "cp1251": "Windows-1251 (Cyrillic)"},
    **{"cp1253": "Windows-1253 (Greek)", "cp1254": "Windows-1254 (Turkish)", "cp1255": "Windows-1255 (Hebrew)"},
    **{"cp1256": "Windows-1256 (Arabic)", "cp874": "Windows-874 (Thai)", "koi8-r": "KOI8-R (Russian)"},
    **{"mac_roman": "Mac Roman (Western European)"},
}
# The most frequent characters of running text; in text that was decoded wrongly they are rare.
_FREQUENT = set(
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多"
    "经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实日军者意无力它与长把机十民第公此已工使情明性知"
    "全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门"
    "任常先海通教儿原东声提立及比员解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接"
    "必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象完设式色路记南品住"
    "告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运请答案苹果写句描述翻译解释"
    "這個們來為國說時會對過發後裡種經麼學現當沒動還進樣開從實軍無與長機關點業將兩間問應戰頭體見產話門東聲論處義條氣題爾別變總電數"
    "報結務場計資統區隊決馬書聽卻達強難權設記類據邊張該規萬術領傳師觀讓識帶導爭運請寫譯釋"
)
_FREQUENT_HANGUL = set("이다는의을를에가하고은로지기도한리사인나시어서대자해일수있만부정그라과보아제전주여요게니오들신")
_WESTERN = set("àâäáãåæçèéêëìíîïñòóôöõøùúûüßœÀÂÄÁÃÅÆÇÈÉÊËÌÍÎÏÑÒÓÔÖÕØÙÚÛÜŒ")
_CENTRAL = set("ąćęłńśźżčďěňřšťůžőűţşăĄĆĘŁŃŚŹŻČĎĚŇŘŠŤŮŽŐŰ")
_TURKISH = set("ğışİĞŞ")
_QUOTES_AND_DASHES = set("‘’“”„–—…€•¡¿«»\u00a0")
_SIGNS = set("°£§©®™´·±²³½")
_CASED_SCRIPTS = ("CYRILLIC", "GREEK")
# script -> its frequent letters
_FREQUENT_LETTERS = {
    "CYRILLIC": set("оеаинтсрвлкмдпуяь"),
    "GREEK": set("αοειντσςρκπυηλμάέήίόύώ"),
    "HEBREW": set("יוהלאתרמבשנםןךדח"),
    "ARABIC": set("اليمنتربودسعفهكحقةأ"),
}
_RARE_THAI = set("ฃฅฆฌฑฒฬฎฏฤฦ๏๚๛฿")
_LEADING_THAI_VOWELS = set("เแโใไ")
# How common an encoding is among data files: decides between texts that are about as plausible.
_PRIORS = {
    **{"cp1250": 0.95, "cp1254": 0.93, "cp1253": 0.9, "cp1255": 0.9, "cp1256": 0.9, "cp874": 0.9, "euc_jp": 0.9},
    **{"koi8-r": 0.85, "mac_roman": 0.7},
}
_LEAST_NUL = 0.01  # the share of NUL bytes from which a file without a mark may be UTF-16: separators and line breaks
_MOST_IRREGULAR = 0.05  # the share of them that may stand at the other byte of a character
_LEAST_PLAUSIBLE = 0.42  # candidates below this score are not offered
_LEAST_PLAUSIBLE_OF_FEW = 0.6  # the same for a file with at most `FEW_BYTES` bytes beyond ASCII
FEW_BYTES = 4
_AMBIGUOUS = 0.88  # a second candidate from this share of the best score on is offered too
_WINDOW = 1 << 16  # bytes that are decoded at once in search of bytes that are not UTF-8
_SURE_CHARACTERS = 5  # characters beyond ASCII of a line that no other encoding writes as valid UTF-8 by chance
_MOST_BROKEN = 1000  # bytes that are not UTF-8, in a file that is UTF-8 apart from them
_MAX_SCORED = 20_000  # characters beyond ASCII whose plausibility is computed
_SAMPLE = 24  # characters of a sample


class EncodingCandidate(NamedTuple):
    """An encoding that decodes a file without an error."""

    name: str  # as Python and `encoding:` take it
    title: str  # as people call it
    sample: str  # a piece of the text around the first character beyond ASCII, on one line
    score: float  # 0 (nobody writes this) to 1 (running text)


def find_mark(head: bytes) -> str:
    """Return the encoding that a byte order mark names; "" = there is none."""
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    return ""


def find_candidates(data: bytes) -> list[EncodingCandidate]:
    """Return the encodings that a file may have, the most plausible first.

    Args:
        data: the bytes of the file, or its beginning up to the end of a line.

    Returns:
        One candidate where the bytes leave no doubt (UTF-8, or a byte order mark); else every candidate that is about
        as plausible as the best one; empty = no encoding gives plausible text.

    """
    mark = find_mark(data)
    if mark:
        return [_make_candidate(mark, text, 1.0)] if (text := _decode(data, mark)) is not None else []
    if b"\0" not in data and (text := _decode(data, "utf-8")) is not None:
        return [_make_candidate("utf-8", text, 1.0)]
    names = _list_wide(data) if b"\0" in data else (*_MULTI_BYTE, *_SINGLE_BYTE)
    if not names:
        return []
    candidates: dict[str, EncodingCandidate] = {}  # text -> candidate
    for name in names:
        text = _decode(data, name)
        if text is None:
            continue
        candidate = _make_candidate(name, text, _score(text, name) * _PRIORS.get(name, 1.0))
        if text not in candidates or candidate.score > candidates[text].score:
            candidates[text] = candidate
    ranked = sorted(candidates.values(), key=lambda candidate: -candidate.score)
    is_short = count_bytes(data, 0x80) <= FEW_BYTES
    if not ranked or ranked[0].score < (_LEAST_PLAUSIBLE_OF_FEW if is_short else _LEAST_PLAUSIBLE):
        return []
    near = [candidate for candidate in ranked if candidate.score >= _AMBIGUOUS * ranked[0].score]
    return near[:2]


def _list_wide(data: bytes) -> tuple[str, ...]:
    """Return the kinds of UTF-16 that a file with NUL bytes may have: each is the higher byte of an ASCII character."""
    if len(data) % 2:
        data = data[:-1]  # the beginning of a file may be cut inside a character
    odd, even = data[1::2].count(0), data[::2].count(0)
    is_regular = min(odd, even) <= _MOST_IRREGULAR * max(odd, even)
    if odd + even < _LEAST_NUL * len(data) or not is_regular:
        return ()
    return ("utf-16-le",) if odd > even else ("utf-16-be",)


def find_broken_utf8(data: bytes) -> list[int]:
    """Return the offsets of the bytes that are not UTF-8, where most of a file is UTF-8; else an empty list.

    A file that is joined from parts of several encodings, or that was cut in the middle of a character, has few of
    them. In a file of another encoding nearly every byte beyond ASCII is one.
    """
    offsets: list[int] = []
    position = 0
    while position < len(data):
        window = data[position : position + _WINDOW]
        try:
            window.decode("utf-8")
            position += len(window)
        except UnicodeDecodeError as error:
            is_cut_by_window = error.reason == "unexpected end of data" and position + len(window) < len(data)
            if is_cut_by_window and error.start > 0:
                position += error.start
                continue
            offsets.append(position + error.start)
            position += error.end
        if len(offsets) > _MOST_BROKEN:
            return _find_broken_lines(data)
    characters = count_bytes(data, 0xC2)  # the first bytes of characters, if the file is UTF-8
    is_mostly_utf8 = characters - len(offsets) > 3 * len(offsets)
    return offsets if is_mostly_utf8 or _is_cut(data, offsets) else _find_broken_lines(data)


def _find_broken_lines(data: bytes) -> list[int]:
    """Return the offset of the first byte that is not UTF-8 of each such line, where other lines surely are UTF-8."""
    offsets: list[int] = []
    has_utf8 = False
    begin = 0
    for line in data.splitlines(keepends=True):
        if not line.isascii():
            try:
                text = line.decode("utf-8")
                has_utf8 = has_utf8 or sum(character > "\x7f" for character in text) >= _SURE_CHARACTERS
            except UnicodeDecodeError as error:
                offsets.append(begin + error.start)
        begin += len(line)
    return offsets if has_utf8 else []


def count_sure_characters(encoding: str) -> int:
    """Return how many characters beyond ASCII of valid UTF-8 no text in this encoding has by chance.

    In an encoding of one byte a character they would be pairs of letters and signs that nobody writes.
    """
    return _SURE_CHARACTERS if codecs.lookup(encoding).name.startswith(_MULTI_BYTE_FAMILIES) else 2


def count_bytes(data: bytes, least: int) -> int:
    """Return how many bytes have at least this value."""
    return len(data) - len(data.translate(None, delete=bytes(range(least, 256))))


def _is_cut(data: bytes, offsets: list[int]) -> bool:
    """Tell whether the only fault of a text is that it ends inside a character."""
    return len(offsets) == 1 and offsets[0] >= len(data) - 3 and count_bytes(data, 0x80) > 3


def _decode(data: bytes, name: str) -> str | None:
    """Return the text of bytes in an encoding; None = they are not in this encoding."""
    try:
        return data.decode(name)
    except UnicodeDecodeError:
        return None


def _make_candidate(name: str, text: str, score: float) -> EncodingCandidate:
    """Return a candidate with a sample of its text."""
    return EncodingCandidate(name, _TITLES.get(name, name.upper()), cut_sample(text), score)


def cut_sample(text: str) -> str:
    """Return a short piece of a text that begins a little before its first character beyond ASCII."""
    first = re.search(r"[^\x00-\x7f\ufeff]", text)
    start = max(0, (first.start() if first else 0) - 4)
    begin = max(text.rfind("\n", 0, first.start() if first else 0) + 1, start)
    piece = re.split(r"[\r\n]", text[begin : begin + _SAMPLE])[0]
    return piece.strip("\ufeff")


def _score(text: str, name: str) -> float:
    """Return how plausible a text is, from 0 to 1: the mean over its characters beyond ASCII."""
    total = number = 0.0
    previous = " "
    for position, character in enumerate(text):
        if "\x20" <= character <= "\x7e" or character in "\t\r\n":
            previous = character
            continue
        following = text[position + 1] if position + 1 < len(text) else " "
        total += _score_character(character, previous, following, name=name)
        number += 1
        previous = character
        if number >= _MAX_SCORED:
            break
    return total / number if number else 1.0


def _score_character(character: str, previous: str, following: str, *, name: str) -> float:
    """Return how plausible a character beyond ASCII is beside its neighbours."""
    code = ord(character)
    if character < "\x20" or 0x7F <= code <= 0x9F or unicodedata.category(character) in ("Co", "Cn", "Cs"):
        return 0.0
    if 0x3400 <= code <= 0x9FFF:
        return _score_ideograph(character, name)
    if 0x3040 <= code <= 0x30FF:
        return 1.0 if name in ("shift_jis", "cp932", "euc_jp") or name.startswith("utf") else 0.2
    if 0xAC00 <= code <= 0xD7A3:
        return 1.0 if character in _FREQUENT_HANGUL else 0.6
    if 0x3000 <= code <= 0x303F or 0xFF01 <= code <= 0xFF60:
        return 0.7
    if 0xFF61 <= code <= 0xFF9F:  # halfwidth katakana, which nearly any bytes give
        return 0.05
    if character in _QUOTES_AND_DASHES:
        return 0.85
    if character in _SIGNS:
        return 0.4
    return _score_letter(character, previous, following)


def _score_ideograph(character: str, name: str) -> float:
    """Return how plausible a Chinese character is: frequent, in the first level of its national standard, or rare."""
    if character in _FREQUENT:
        return 1.0
    first = character.encode(name)[0] if not name.startswith("utf") else 0
    if name in ("gbk", "gb18030"):
        return 0.5 if 0xB0 <= first <= 0xD7 and character.encode(name)[1] >= 0xA1 else 0.1
    if name in ("big5", "cp950"):
        return 0.5 if 0xA4 <= first <= 0xC6 else 0.1
    if name in ("shift_jis", "cp932"):
        return 0.5 if 0x88 <= first <= 0x97 else 0.1
    if name == "euc_jp":
        return 0.5 if 0xB0 <= first <= 0xCF else 0.1
    return 0.1 if name == "cp949" else 0.4


def _score_letter(character: str, previous: str, following: str) -> float:
    """Return how plausible a letter of another alphabet is beside its neighbours."""
    script = unicodedata.name(character, "").partition(" ")[0]
    if script == "LATIN" and character.isalpha():
        if _is_foreign(previous) and _is_foreign(following):
            return 0.05
        if character.isupper() and previous.islower():
            return 0.1
        if character in _WESTERN or character in _TURKISH:
            return 0.9
        return 0.85 if character in _CENTRAL else 0.3
    if script == "THAI":
        return _score_thai(character, previous, following)
    if script not in _FREQUENT_LETTERS:
        return 0.05
    if (previous.isascii() and previous.isalpha()) or (following.isascii() and following.isalpha()):
        return 0.1
    if script in _CASED_SCRIPTS and character.isupper() and _is_inside_word(previous, following):
        return 0.1
    return 0.9 if character.lower() in _FREQUENT_LETTERS[script] else 0.4


def _is_inside_word(previous: str, following: str) -> bool:
    """Tell whether a capital letter stands after a small one, or between two letters of its alphabet."""
    return previous.islower() or (_is_foreign(previous) and _is_foreign(following))


def _score_thai(character: str, previous: str, following: str) -> float:
    """Return how plausible a Thai character is: a mark stands on a letter, some vowels stand before one."""
    if unicodedata.category(character) == "Mn" and not ("ก" <= previous <= "ฮ" or "\u0e31" <= previous <= "\u0e4d"):
        return 0.0
    if character in _LEADING_THAI_VOWELS and not "ก" <= following <= "ฮ":
        return 0.0
    return 0.1 if character in _RARE_THAI or character.isdigit() else 0.7


def _is_foreign(character: str) -> bool:
    """Tell whether a neighbour is beyond ASCII."""
    return character > "\x7f"
