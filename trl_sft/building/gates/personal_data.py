"""The gate `personal`: addresses, numbers and keys of people, by exact patterns and their check digits.

In: a row. Out: the kind of what was found; the value itself is not repeated. Numbers of cards and accounts count only
with right check digits (Luhn, ISO 7064 as ISO 13616 uses it, GB 11643). Examples of documentation (example.com, 555
numbers, private addresses) do not count. Not here: names and postal addresses, which need a model (presidio).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from trl_sft import redaction
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates.row_text import join_texts

_EMAIL = re.compile(r"(?<![\w.+-])[A-Za-z0-9][\w.+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![\w@-])")
_CARD = re.compile(r"(?<![\d.,-])(?:\d[ -]?){12,18}\d(?![\d.,]*\d)")
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_US_NUMBER = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
# a number that follows another one with a hyphen, or that an operator follows, is part of a calculation
_NO_CALCULATION = r"(?!\s?[=*/+×÷])"
_CHINESE_MOBILE = re.compile(
    r"(?<![\d.])(?<!\d-)(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?![\d.]*\d)(?!-\d)" + _NO_CALCULATION
)
_PHONE = re.compile(
    r"(?<![\w+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,3}(?![\d-])"
    r"|(?<!\w)\(\d{3}\) ?\d{3}[ .-]\d{4}(?!\d)|(?<![\d-])\d{3}[.-]\d{3}[.-]\d{4}(?![\d-])" + _NO_CALCULATION
)
_ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_LONG_NUMBER = re.compile(r"\d(?:[ .()-]{0,2}\d){8}")
_LONG_WORD = re.compile(r"[A-Za-z0-9_-]{13}|-----BEGIN")  # a key of a service has one
_VERSION = re.compile(r"(?:version|release|firmware|v)[ :.]*$", re.IGNORECASE)  # before a number of four parts
# RFC 2606, and hosts that texts name as examples
_EXAMPLE_HOSTS = re.compile(
    r"(?:^|\.)(?:example|sample|test|domain|email|mail|yourdomain|company|yourcompany|abc|xyz)\.[a-z.]+$|\.(?:test|example|invalid|localhost)$"
)
_EXAMPLE_USERS = re.compile(
    r"^(?:user(?:name)?|your.?(?:name|email)|name|example|test|info|support|contact|admin|john.?doe|jane.?doe|me|abc|xyz)\b",
    re.IGNORECASE,
)
_EXAMPLE_US_NUMBERS = {"078-05-1120", "219-09-9999", "123-45-6789", "111-11-1111", "987-65-4321"}
_EXAMPLE_CARDS = {"4111111111111111", "4242424242424242", "5555555555554444", "378282246310005", "6011111111111117"}
_CARD_BEGINNINGS = re.compile(r"^(?:4|5[1-5]|2[2-7]|3[47]|6(?:011|5|4[4-9])|35|62)")
_ID_WEIGHTS = (7, 9, 10, 5, 8, 4, 2, 1, 6, 3, 7, 9, 10, 5, 8, 4, 2)
_FEW_DIGITS = 2  # a number of so few different digits is made up: 4444 4444 4444 4444


class PersonalDataGate:
    """Rejects rows that hold what identifies a person, or a secret key."""

    name = "personal"

    def check(self, row: CandidateRow) -> Rejection | None:
        """Search all turns."""
        kinds = find_personal_data(join_texts(row))
        return Rejection(self.name, f"the row holds {' and '.join(kinds)}") if kinds else None


def find_personal_data(text: str) -> list[str]:
    """Return the kinds of personal data in a text, each once.

    Example:
        >>> find_personal_data("Write to maria.lopez@gmail.com")
        ['an e-mail address']

    """
    kinds = []
    for kind, pattern, is_real, hint in _KINDS:
        if hint.search(text) and any(is_real(found) for found in pattern.finditer(text)) and kind not in kinds:
            kinds.append(kind)
    return kinds + (["a secret key"] if _LONG_WORD.search(text) and redaction.find_shapes(text) else [])


def _is_email(found: re.Match[str]) -> bool:
    """Tell whether an e-mail address is none of an example."""
    return not _EXAMPLE_HOSTS.search(found[1].lower()) and not _EXAMPLE_USERS.search(found[0])


def _is_card(found: re.Match[str]) -> bool:
    """Tell whether a number is that of a card: its beginning, its length, and the check digit of Luhn."""
    digits = re.sub(r"\D", "", found[0])
    if digits in _EXAMPLE_CARDS or len(set(digits)) <= _FEW_DIGITS or not _CARD_BEGINNINGS.match(digits):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_iban(found: re.Match[str]) -> bool:
    """Tell whether the two check digits of an account number are right (ISO 13616)."""
    compact = found[0].replace(" ", "")
    number = "".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])
    return 15 <= len(compact) <= 34 and int(number) % 97 == 1


def _is_chinese_id(found: re.Match[str]) -> bool:
    """Tell whether the check character of a Chinese identity number is right (GB 11643)."""
    total = sum(int(digit) * weight for digit, weight in zip(found[0], _ID_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == found[0][-1].upper()


def _is_us_number(found: re.Match[str]) -> bool:
    """Tell whether a social security number is none of an example."""
    return found[0] not in _EXAMPLE_US_NUMBERS


def _is_phone(found: re.Match[str]) -> bool:
    """Tell whether a telephone number is none of an example: 555, or digits in order or all alike."""
    digits = re.sub(r"\D", "", found[0])
    return "555" not in digits and len(set(digits)) > _FEW_DIGITS + 1 and "123456" not in digits and len(digits) >= 10


def _is_address(found: re.Match[str]) -> bool:
    """Tell whether an IP address belongs to a host that can be reached from outside."""
    if _VERSION.search(found.string[max(0, found.start() - 12) : found.start()]):
        return False
    try:
        return ipaddress.ip_address(found[0]).is_global and found[0] not in ("8.8.8.8", "8.8.4.4", "1.1.1.1")
    except ValueError:
        return False


# what is found, its pattern, whether a match counts, and a pattern that is quick and matches wherever the other does
_KINDS: tuple[tuple[str, re.Pattern[str], Callable[[re.Match[str]], bool], re.Pattern[str]], ...] = (
    ("an e-mail address", _EMAIL, _is_email, re.compile("@")),
    ("a card number", _CARD, _is_card, _LONG_NUMBER),
    ("an account number", _IBAN, _is_iban, re.compile(r"[A-Z]{2}\d{2} ?[A-Z0-9]{4}")),
    ("a social security number", _US_NUMBER, _is_us_number, _LONG_NUMBER),
    ("a Chinese identity number", _CHINESE_ID, _is_chinese_id, _LONG_NUMBER),
    ("a telephone number", _CHINESE_MOBILE, _is_phone, _LONG_NUMBER),
    ("a telephone number", _PHONE, _is_phone, _LONG_NUMBER),
    ("an IP address", _ADDRESS, _is_address, re.compile(r"\d\.\d{1,3}\.\d")),
)
