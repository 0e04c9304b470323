"""The gate `personal`: addresses, numbers and keys of people, by exact patterns and their check digits.

In: a row. Out: the kind of what was found; the value itself is not repeated. Numbers of cards and accounts count only
with right check digits (Luhn, ISO 7064 as ISO 13616 uses it, GB 11643). A plain number counts where the words before
it say what it is: one card number in ten thousand products of an exercise is right by chance. Examples of
documentation (example.com, 555 numbers, private addresses), addresses of a role (noreply@), and numbers of orders,
versions and exercises do not count. Not here: names and postal addresses, which need a model (presidio).
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable

from trl_sft import redaction
from trl_sft.building.candidates import CandidateRow, Rejection
from trl_sft.building.gates import request_kinds
from trl_sft.building.gates.row_text import join_texts

_EMAIL = re.compile(
    r"(?<![A-Za-z0-9_.+@-])[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}@((?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24})(?![A-Za-z0-9_@-])"
)
_CARD = re.compile(
    r"(?<![\d.,-])(?<!\d )(?:\d{4}([ -])\d{4}\1\d{4}\1\d{4}(?:\1\d{1,3})?|3[47]\d{2}([ -])\d{6}\2\d{5}|\d{15,19})"
    r"(?![\d.,]*\d)(?![ -]\d)"
)
_IBAN = re.compile(r"(?<![A-Za-z0-9])[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?![A-Za-z0-9])")
_WELL_KNOWN_IBANS = {
    *("GB82WEST12345698765432", "GB29NWBK60161331926819", "GB33BUKB20201555555555", "DE89370400440532013000"),
    *("FR1420041010050500013M02606", "FR7630006000011234567890189", "NL91ABNA0417164300", "CH9300762011623852957"),
    *("ES9121000418450200051332", "IT60X0542811101000000123456", "BE68539007547034", "AT611904300234573201"),
}  # of the registry of ISO 13616 and of Wikipedia
_US_NUMBER = re.compile(r"(?<![\d-])(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
_CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])\d{3}[\dXx](?!\d)")
# a number that follows another one with a hyphen, or that an operator follows, is part of a calculation
_NO_CALCULATION = r"(?!\s?[=*/+×÷])"
_CHINESE_MOBILE = re.compile(
    r"(?<![\d.])(?<!\d-)(?:(?:\+|00)?86[ -]?)?1[3-9]\d[ -]?\d{4}[ -]?\d{4}(?![\d.]*\d)(?!-\d)" + _NO_CALCULATION
)
_PHONE = re.compile(
    r"(?<![A-Za-z0-9_+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{2,4}(?:[ .-]?\d{2,4}){1,3}(?![\d-])"
    r"|(?<![A-Za-z0-9_.,/-])0\d{1,4}(?:[ /.-]?\d{2,4}){2,4}(?![\d-])"
    r"|(?<![A-Za-z0-9_])\(\d{3}\) ?\d{3}[ .-]\d{4}(?!\d)|(?<![\d-])\d{3}[.-]\d{3}[.-]\d{4}(?![\d-])" + _NO_CALCULATION
)
_ADDRESS = re.compile(r"(?<![\d.])(?:\d{1,3}\.){3}\d{1,3}(?![\d.]*\d)")
_LONG_NUMBER = re.compile(r"\d(?:[ .()-]{0,2}\d){8}")
_LONG_WORD = re.compile(r"[A-Za-z0-9_-]{13,}")
_LONGEST_WORD = 39  # letters; 40 small letters may be hexadecimal digits
_VERSION = re.compile(  # before a number of four parts
    r"\b(?:v(?:ersions?)?|release|firmware|driver|build|upgrade|update|chrome|kernel|patch|(?:sub)?section|chapter|clause|article"
    r"|figure|table|paragraph|rule|step)\b[^!?]{0,30}$|§ ?$|\bv$",
    re.IGNORECASE,
)
_RESOLVERS = {
    *("8.8.8.8", "8.8.4.4", "1.1.1.1", "1.0.0.1", "9.9.9.9", "149.112.112.112", "208.67.222.222", "208.67.220.220"),
    *("4.2.2.1", "4.2.2.2", "114.114.114.114", "223.5.5.5", "223.6.6.6", "119.29.29.29", "180.76.76.76"),
}
_PLAIN_NUMBER = re.compile(r"\d{3}[.-]\d{3}[.-]\d{4}")
_FREE_CALLS = {"800", "822", "833", "844", "855", "866", "877", "888"}  # numbers of firms
_COUNTRY_LETTERS = 2
_DIGEST = re.compile(r"[0-9a-f]{40}")  # a commit or SHA-1; keys of Weights & Biases look alike
_KEY_CONTENT = re.compile(r"KEY-----\s*(?:[A-Za-z0-9+/=]{40,}\s*)")
_EXAMPLE_TOKEN = "eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIiOiIxMjM0NTY3ODkw"  # of RFC 7519's sites
# RFC 2606, and hosts that texts name as examples
_EXAMPLE_HOSTS = re.compile(
    r"(?:^|\.)(?:example|sample|test|domain|email|mail|yourdomain|company|yourcompany|abc|xyz|foo|bar|baz|acme|[a-z])\.[a-z.]+$"
    r"|\.(?:test|example|invalid|localhost|local|internal|lan)$"
)
# examples, and addresses of a role, which belong to no person
_EXAMPLE_USERS = re.compile(
    r"^(?:user(?:name)?|your.?(?:name|email)|name|example|test|info|support|contact|admin(?:istrator)?|john.?doe|jane.?doe|me"
    r"|abc|xyz|foo|bar|baz|no-?reply|do-?not-?reply|git|root|ubuntu|ec2-user|deploy|post(?:master|gres)|webmaster|hostmaster"
    r"|hello|sales|office|press|service|help(?:desk)?|feedback|careers|jobs|privacy|security|abuse|billing|news(?:letter)?"
    r"|team|enquiries|inquiries|orders|marketing|media|hr|kontakt|contacto)@",
    re.IGNORECASE,
)
_NO_ADDRESS_BEFORE = re.compile(
    r"(?:\b(?:ssh|scp|sftp|rsync|telnet)\b[^\n]{0,40}|//|\bnpm i(?:nstall)? [^\n]{0,60}|@)$"
)
# the last part of a host: two letters, or a common one; `name@2x.png` and `value@Test.expected` have none
_TOP_DOMAINS = frozenset(
    "com org net edu gov mil int info biz name pro mobi app dev xyz online site store tech shop club live email cloud"
    " blog agency world life academy company solutions digital group studio design media space website fun top work"
    " today global health care law bank jobs tel travel museum aero coop cat asia berlin london paris nyc tokyo wien"
    " hamburg swiss".split()
)
_NO_DOMAINS = frozenset("js ts py rb cs go sh md rs pl".split())  # ends of files more often than countries
# words that stand before a number, and say what it is
_CARD_WORDS = re.compile(r"card|visa|amex|credit|debit|\bpay|paid|\bCVV|expir|银行卡|信用卡|卡号", re.IGNORECASE)
_PHONE_WORDS = re.compile(
    r"\bcall|phone|\btel\b|\bcell|mobile|contact|\breach|\btext(?:ed)?\b|\bfax|\bdial|\bring\b|whats ?app|téléph|tél\b"
    r"|telef|\bnumber (?:is|was)\b|\b(?:his|her|my|their) number|\bat$|电话|手机|联系|拨打|致电|微信|号码是",
    re.IGNORECASE,
)
_OTHER_NUMBERS = re.compile(
    r"\border|\bpart\b|\bbuild\b|\bmodel\b|serial|\bratio|invoice|\bticket|\bitem\b|\bsku\b|\bcase\b|version|product"
    r"|[=×*+÷^√]|\bsum\b|\btimes\b|comput|calculat|multipl|sequence|fibonacci|prime|等于|计算|答案|[乘加减除]|结果|得数|订单"
    r"|编号|序列|位数|单号",
    re.IGNORECASE,
)
_WINDOW = 60  # characters before a number in which such a word counts
_EXAMPLE_US_NUMBERS = {"078-05-1120", "219-09-9999", "123-45-6789", "111-11-1111", "987-65-4321"}
_EXAMPLE_CARDS = {"4111111111111111", "4242424242424242", "5555555555554444", "378282246310005", "6011111111111117"}
_EXAMPLE_SECRETS = re.compile(r"EXAMPLE|example|your|YOUR|xxxx|XXXX|\.\.\.|0123456789|1234567890")
_CARD_BEGINNINGS = re.compile(  # of 16 digits, American Express, UnionPay, and long ones of Visa
    r"(?=\d{16}$)(?:4|5[1-5]|2[2-7]|6011|65|64[4-9]|35)|(?=\d{15}$)3[47]|(?=\d{16,19}$)62|(?=\d{19}$)4"
)
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
    hints = {hint: hint.search(text) is not None for hint in _HINTS}
    for kind, pattern, is_real, hint in _KINDS:
        if hints[hint] and any(is_real(found) for found in pattern.finditer(text)) and kind not in kinds:
            kinds.append(kind)
    return kinds + (["a secret key"] if _may_hold_key(text) and _has_secret(text) else [])


def _may_hold_key(text: str) -> bool:
    """Tell whether a text has a long word that is no word of a language, as every key of a service is."""
    for word in _LONG_WORD.findall(text):
        rest = word[1:]  # a word of a language may begin with a capital letter
        if len(word) > _LONGEST_WORD or not (rest.isalpha() and rest.islower()):
            return True
    return "-----BEGIN" in text


def _read_before(found: re.Match[str]) -> str:
    """Return the text before a match."""
    return found.string[max(0, found.start() - _WINDOW) : found.start()]


def _has_secret(text: str) -> bool:
    """Tell whether a text has the key of a service: no example, no beginning of a key alone, and no digest."""
    shapes = [shape for shape in redaction.find_shapes(text) if not _EXAMPLE_SECRETS.search(shape)]
    return any(not _DIGEST.fullmatch(shape) and not _is_example_key(shape) for shape in shapes)


def _is_example_key(shape: str) -> bool:
    """Tell whether a private key has no content, or a token is that of the documentation of JSON Web Tokens."""
    if shape.startswith("-----BEGIN"):
        return not _KEY_CONTENT.search(shape)
    return shape.startswith(_EXAMPLE_TOKEN)


def _is_email(found: re.Match[str]) -> bool:
    """Tell whether an e-mail address is that of a person, and no example, no login of a command and no code."""
    if _EXAMPLE_HOSTS.search(found[1].lower()) or _EXAMPLE_USERS.search(found[0]):
        return False
    if found.string[found.end() :].startswith(":") and re.match(r":[\w/~.]", found.string[found.end() :]):
        return False  # host:path, as scp and git write it
    end = found[1].rpartition(".")[2]
    if end.lower() in _NO_DOMAINS or not (len(end) == _COUNTRY_LETTERS or end.lower() in _TOP_DOMAINS):
        return False
    return not _NO_ADDRESS_BEFORE.search(_read_before(found))


def _is_card(found: re.Match[str]) -> bool:
    """Tell whether a number is that of a card: its beginning, its length, and the check digit of Luhn."""
    digits = re.sub(r"\D", "", found[0])
    if digits == found[0] and not _CARD_WORDS.search(_read_before(found)):
        return False
    if digits in _EXAMPLE_CARDS or len(set(digits)) <= _FEW_DIGITS or not _CARD_BEGINNINGS.match(digits):
        return False
    doubled = [int(digit) * (1 + place % 2) for place, digit in enumerate(reversed(digits))]
    return sum(value - 9 if value > 9 else value for value in doubled) % 10 == 0


def _is_iban(found: re.Match[str]) -> bool:
    """Tell whether the two check digits of an account number are right (ISO 13616)."""
    compact = found[0].replace(" ", "")
    number = "".join(str(int(letter, 36)) for letter in compact[4:] + compact[:4])
    if compact in _WELL_KNOWN_IBANS:
        return False
    return 15 <= len(compact) <= 34 and int(number) % 97 == 1


def _is_chinese_id(found: re.Match[str]) -> bool:
    """Tell whether the check character of a Chinese identity number is right (GB 11643)."""
    total = sum(int(digit) * weight for digit, weight in zip(found[0], _ID_WEIGHTS, strict=False))
    return "10X98765432"[total % 11] == found[0][-1].upper()


def _is_us_number(found: re.Match[str]) -> bool:
    """Tell whether a social security number is none of an example."""
    return found[0] not in _EXAMPLE_US_NUMBERS and not found[0].startswith("123-45-6")


def _is_phone(found: re.Match[str]) -> bool:
    """Tell whether a telephone number is none of an example (555, digits in order or all alike), an order or a sum."""
    digits = re.sub(r"\D", "", found[0])
    before = _read_before(found)
    if not found[0].startswith(("+", "(")):
        if _OTHER_NUMBERS.search(before) and not _PHONE_WORDS.search(before):
            return False
        if found[0].startswith("0") and not _PHONE_WORDS.search(before):
            return False
        if _PLAIN_NUMBER.fullmatch(found[0]) and not _is_american(found[0], before):
            return False
    return "555" not in digits and len(set(digits)) > _FEW_DIGITS + 1 and "123456" not in digits and len(digits) >= 10


def _is_american(number: str, before: str) -> bool:
    """Tell whether ten digits are a number of a person by the plan of North America, with a word that says so."""
    area, exchange = number[:3], number[4:7]
    if area[0] in "01" or exchange[0] in "01" or area in _FREE_CALLS:
        return False
    return bool(_PHONE_WORDS.search(before))


def _is_address(found: re.Match[str]) -> bool:
    """Tell whether an IP address belongs to one host that can be reached from outside, and is no exercise."""
    text = found.string
    if _VERSION.search(text[max(0, found.start() - 40) : found.start()]) or text[found.end() :].startswith("/"):
        return False
    if found[0].endswith((".0", ".255")) or found[0] in _RESOLVERS or request_kinds.NETWORK.search(text):
        return False
    try:
        return ipaddress.ip_address(found[0]).is_global
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
_HINTS = tuple({hint for _, _, _, hint in _KINDS})
