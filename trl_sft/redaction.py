"""Secrets in texts: how they are recognised, and how they are taken out of everything that is printed or written.

Inputs: texts that a user wrote (a recipe, arguments, settings of another trainer), and the environment. A secret is
recognised there, once: by the name of its key (also misspelt), by its shape, or in a URL.
Outputs: texts without these secrets, however each is quoted in them. All output passes through `redact`: screens,
JSON answers, every file of `run_folder.write_text`.
Not here: the nodes of a recipe (`recipe.secret_values`). A row of data is not searched for shapes: it is shown as the
model sees it.
"""

from __future__ import annotations

import functools
import html
import itertools
import json
import os
import re
import shlex
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any

REDACTED = "(left out)"

_MIN_LENGTH = 3  # characters
_MIN_LENGTH_IN_WORDS = 8  # a shorter secret is recognised only where no letter or digit stands beside it
_MAX_LENGTH = 4096
_MIN_PART = 4  # of a part of a secret
_MIN_VARIABLE_LENGTH = 8  # of the value of an environment variable
# Of a long secret its beginning is recognised too, since a message may cut a value.
_CUT_LENGTH, _BEGINNING = 24, 12

# The forms of tokens and keys, as their services document them. Each needs more than letters after its prefix where
# an ordinary name could begin like it (`hf_datasets`).
_SHAPE = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"hf_(?=[a-z]{0,40}[A-Z0-9])[A-Za-z0-9]{10,}"  # Hugging Face
    r"|api_org_(?=[a-z]{0,40}[A-Z0-9])[A-Za-z0-9]{10,}"
    r"|sk-(?=[a-z-]{0,40}[A-Z0-9])[A-Za-z0-9_-]{16,}"  # OpenAI, Anthropic, OpenRouter
    r"|[srp]k_(?:live|test)_[A-Za-z0-9]{10,}"  # Stripe
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}|glpat-[A-Za-z0-9_-]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{12,}|AIza[A-Za-z0-9_-]{30,}"  # AWS, Google
    r"|xox[abposr]-[A-Za-z0-9-]{10,}"  # Slack
    r"|gsk_[A-Za-z0-9]{20,}|nvapi-[A-Za-z0-9_-]{20,}|r8_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[A-Za-z0-9_-]{30,}|dckr_pat_[A-Za-z0-9_-]{16,}|wandb_v1_[A-Za-z0-9_]{16,}"
    r"|eyJ[A-Za-z0-9_-]{8,1000}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]+)?"  # JSON Web Token, RFC 7519
    r")"
    r"|-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----.*?(?:-----END [A-Z ]{0,30}PRIVATE KEY-----|\Z)",
    re.DOTALL,
)
# Keys of Weights & Biases have 40 hexadecimal digits, and so have the names of commits. A commit stands under a key
# of these words, or is a part of a path.
_HEXADECIMAL = re.compile(r"(?<![A-Za-z0-9/_-])[0-9a-f]{40}(?![A-Za-z0-9/_-])")
_COMMIT_WORD = re.compile(r"revision|commit|\bsha|hash|digest|checksum", re.IGNORECASE)

# User and password of a URL. pathlib joins two slashes into one; then only `user:password` is certain.
_URL_USER = re.compile(r"(?<=://)[^/\s\"<>]+(?=@)|(?<=:/)[^/@\s:\"<>]+:[^/@\s\"<>]+(?=@)")
_URL_ARGUMENT = re.compile(r"(?<=[?&;])(?P<name>[A-Za-z][\w.-]*)=(?P<value>[^\s&;#\"'<>]+)")
_ARGUMENT_NAMES = ("sig", "signature", "key", "auth", "sas", "xamzsignature", "xamzcredential", "xamzsecuritytoken")

# Names of keys without separators; a key ends in one of them, or is a misspelling of one.
_NAMES = (
    *("hubtoken", "hftoken", "accesstoken", "authtoken", "apitoken", "sessiontoken", "securitytoken", "bearertoken"),
    *("refreshtoken", "sastoken", "pushtohubtoken", "wandbtoken"),
    *("apikey", "accesskey", "accesskeyid", "secretkey", "privatekey", "accountkey", "wandbkey", "wandbapikey"),
    *("password", "passwd", "passphrase", "secret", "credential", "credentials", "authorization", "connectionstring"),
)
_NO_SECRETS = (REDACTED, "none", "null", "true", "false", "yes", "auto")  # values under a secret key
_WHOLE_NAMES = ("token", "pwd", "pass", "auth", "bearer", "cookie")
# `eos_token` and its like name a token of the vocabulary.
_VOCABULARY = re.compile(
    r"^(?:\w*_)?(?:eos|bos|pad|unk|sep|cls|mask|eot|eom|image|video|audio|boi|eoi|start|end|stop|special|think\w*)"
    r"_?tokens?(?:_ids?)?$|^paraphras\w*$"  # and `paraphrase` is no misspelling of `passphrase`
)
_FROM_LOOKALIKES = str.maketrans("асеорухіѕткΑΒΕΚΜΝΟΡΤΧ", "aceopyxistkabekmnoptx")
_VARIABLE = re.compile(
    r"(TOKEN|API_?KEY|ACCESS_KEY(_ID)?|SECRET(_KEY)?|PASSWORD|PASSWD|PASSPHRASE)$|^WANDB_KEY$", re.IGNORECASE
)
# `name: value`, `name = value`, `"name": "value"`, on any line, in a comment too
_PAIR = re.compile(r"(?<![\w.])(?P<name>[^\W\d][\w.-]{0,63})[\"']?[ \t]*[:=][ \t]*[\"']?(?P<value>[^\s\"',}\]]+)")
_OPAQUE = re.compile(r"[\w.+/=:~!$%^*-]+")
_PART = re.compile(r"[\w.-]+[\"']?")  # of a token; the key of the next line ends in a colon
_STRING_OF_JSON = re.compile(r'"(?:[^"\\]|\\.)*"')

# The secrets of the texts that this process has read. Functions that `datasets` pickles reach this module by its name.
_known: set[str] = set()


def register(value: Any) -> None:
    """Remember a value that is a secret, with everything inside it; not one of one or two characters."""
    if isinstance(value, dict | list | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            register(inner)
        return
    if value is None or isinstance(value, bool):
        return
    text = str(value).strip()[:_MAX_LENGTH]  # the rest is found by its beginning
    words = text.split()
    pieces = {text, "".join(words), *filter(_looks_opaque, words)}
    if text.isdecimal() and len(text) < 400:  # Python refuses to read thousands of digits
        pieces.add(str(int(text)))
    _known.update(piece for piece in pieces if len(piece) >= _MIN_LENGTH and piece.lower() not in _NO_SECRETS)


def register_line(text: str) -> None:
    """Remember a line, or a part of a line, of a secret that stands on several lines."""
    if len(text) >= _MIN_PART and text != REDACTED:
        _known.add(text)


def register_text(text: str) -> None:
    """Remember the secrets that a text of a user shows: by their shape, in URLs, and as `name: value`."""
    for shape in find_shapes(text):
        register(shape)
    for match in _URL_USER.finditer(text):
        register(match[0].rpartition(":")[2])
    for match in _URL_ARGUMENT.finditer(text):
        if _is_url_secret(match["name"]):
            register(match["value"])
    for match in _PAIR.finditer(text):
        if is_secret_name(match["name"], match["value"]) and _looks_opaque(match["value"]):
            register(match["value"])
    _register_split_shapes(text)


def register_arguments(arguments: Sequence[str]) -> None:
    """Remember the secrets of a command line: `train.hub_token=VALUE`, `--hub_token VALUE`, and by their shape."""
    for number, argument in enumerate(arguments):
        register_text(argument)
        name, equals, value = argument.partition("=")
        name = name.rpartition(".")[2].strip("- \"'")
        if equals and is_secret_name(name, value):
            register(value)
        elif argument.startswith("-") and not equals and number + 1 < len(arguments):
            value = arguments[number + 1]
            if is_secret_name(name, value):
                register(value)


def find_shapes(text: str, key: str = "") -> list[str]:
    """Return the parts of a text that have the shape of a token or a key; `key` is the key of the text."""
    shapes = [match[0] for match in _SHAPE.finditer(text)]
    for line in text.splitlines():
        if not _COMMIT_WORD.search(line) and not _COMMIT_WORD.search(key):
            shapes += _HEXADECIMAL.findall(line)
    return shapes


@functools.lru_cache(maxsize=4096)
def _compare_name(name: str) -> str:
    """Return how certain it is that a key holds a secret: "yes", "perhaps" (its value has to look like one), "no"."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.translate(_FROM_LOOKALIKES)).lower()
    if _VOCABULARY.match(words.replace("-", "_")):
        return "no"
    letters = re.sub(r"[^a-z]", "", words)
    if letters in _WHOLE_NAMES or letters.endswith(_NAMES):
        return "yes"
    if letters == "tokens":  # of a vocabulary, in the files of other trainers
        return "perhaps"
    if 4 <= len(letters) <= 24:
        for known in (*_NAMES, "token"):
            allowed = 2 if len(known) >= 9 else 1
            if _count_edits(letters, known, allowed) <= allowed:
                return "yes"
    return "perhaps" if letters.endswith("token") or letters == "key" else "no"


def is_secret_name(name: object, value: object = None) -> bool:
    """Tell whether a key holds a secret, also if the key is misspelt.

    Args:
        name: The key, `hub_token`, `apiKey` or `pasword`.
        value: Its value, which decides where the name alone is not certain (`my_token`).

    """
    certainty = _compare_name(name) if isinstance(name, str) and len(name) <= 64 else "no"
    return certainty == "yes" or (certainty == "perhaps" and isinstance(value, str) and _looks_opaque(value))


def redact(text: str) -> str:
    """Return a text without secrets: those that were registered, those of the environment, and those of URLs."""
    pattern = _compile((*_known, *_list_variables()))
    return _redact(text, pattern)


def redact_json(text: str) -> str:
    """Return JSON without the secrets in its strings; a number stays, so that the text stays JSON."""
    pattern = _compile((*_known, *_list_variables()))
    return _STRING_OF_JSON.sub(lambda match: _redact(match[0], pattern), text)


def redact_values(value: Any) -> Any:
    """Return a value of mappings, lists and texts without the secrets in its texts, keys and numbers."""
    pattern = _compile((*_known, *_list_variables()))

    def replace(inner: Any) -> Any:
        if isinstance(inner, dict):
            return {_redact(name, pattern) if isinstance(name, str) else name: replace(i) for name, i in inner.items()}
        if isinstance(inner, list):
            return [replace(item) for item in inner]
        if isinstance(inner, int | float) and not isinstance(inner, bool):
            return REDACTED if str(inner) in _known else inner
        return _redact(inner, pattern) if isinstance(inner, str) else inner

    return replace(value)


def redact_shapes(text: str) -> str:
    """Return a text as `redact` does, and without what has the shape of a secret: for a text that nobody registered."""
    for shape in find_shapes(text):
        text = text.replace(shape, REDACTED)
    return redact(text)


def _redact(text: str, pattern: re.Pattern[str] | None) -> str:
    if ":/" in text:
        text = _URL_USER.sub(REDACTED, text)
    if "=" in text:
        text = _URL_ARGUMENT.sub(_redact_argument, text)
    return text if pattern is None else pattern.sub(REDACTED, text)


def _redact_argument(match: re.Match[str]) -> str:
    is_known = REDACTED.startswith(match["value"])  # left out already
    return f"{match['name']}={REDACTED}" if _is_url_secret(match["name"]) and not is_known else match[0]


def _is_url_secret(name: str) -> bool:
    """Tell whether an argument of a URL holds a secret."""
    return is_secret_name(name) or re.sub(r"[^a-z]", "", name.lower()) in _ARGUMENT_NAMES


def _list_variables() -> list[str]:
    """Return the values of the environment variables that are named as a secret."""
    return [
        value
        for name, value in os.environ.items()
        if _VARIABLE.search(name) and len(value) >= _MIN_VARIABLE_LENGTH and not os.path.isabs(value)  # noqa: PTH117
    ]


@functools.lru_cache(maxsize=64)
def _compile(secrets: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return the pattern of secrets in every quotation, the longest first; None if there is none."""
    forms = {form for secret in secrets for form in _list_forms(secret)}
    if not forms:
        return None
    patterns = []
    for form in sorted(forms, key=len, reverse=True):
        pattern = re.escape(form)
        is_word = form.isascii() and form.isalpha() and form.islower()  # which other words may contain
        if is_word or len(form) < _MIN_LENGTH_IN_WORDS:
            pattern = rf"(?<![A-Za-z0-9]){pattern}(?![A-Za-z0-9])"
        patterns.append(pattern)
        if len(form) >= _CUT_LENGTH and not form.isspace():
            patterns.append(re.escape(form[:_BEGINNING]) + r"[^\s\"'`,;)\]}]*")
    return re.compile("|".join(patterns))


def _list_forms(secret: str) -> Iterable[str]:
    """Return a secret as Python, JSON, YAML, HTML, a shell and a URL write it."""
    forms = {secret}
    if re.fullmatch(r"[\w.-]+", secret, re.ASCII):
        return forms
    forms |= {repr(secret)[1:-1], secret.replace("'", "''"), html.escape(secret), html.escape(secret, quote=False)}
    forms |= {shlex.quote(secret), urllib.parse.quote(secret), urllib.parse.quote(secret, safe="")}
    forms |= {json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (True, False)}
    return forms


def _register_split_shapes(text: str) -> None:
    """Remember both parts of a shape that a line break divides, as in a comment or a folded text."""
    lines = text.splitlines()
    for line, following in itertools.pairwise(lines):
        words, more = line.rstrip(" \t\\").split(), following.lstrip("# \t").split()
        if not words or not more or not _PART.fullmatch(more[0]):
            continue
        if line.lstrip().startswith("#") != following.lstrip().startswith("#"):
            continue
        head, tail = words[-1], more[0]
        joined = head + tail
        if any(joined.index(shape) < len(head) < joined.index(shape) + len(shape) for shape in find_shapes(joined)):
            for part in (head, tail):
                if len(part.strip("\"'")) >= _MIN_PART:
                    _known.add(part.strip("\"'"))


def _looks_opaque(value: str) -> bool:
    """Tell whether a value is no word: one of some length, with digits or with letters of both cases."""
    if len(value) < _MIN_VARIABLE_LENGTH or not _OPAQUE.fullmatch(value):
        return False
    return any(map(str.isdigit, value)) or (any(map(str.islower, value)) and any(map(str.isupper, value)))


def _count_edits(one: str, other: str, limit: int) -> int:
    """Return the number of letters to insert, remove, replace or transpose; more than `limit` is `limit + 1`."""
    if abs(len(one) - len(other)) > limit:
        return limit + 1
    rows = [list(range(len(other) + 1))]
    for i, letter in enumerate(one, 1):
        row = [i]
        for j, target in enumerate(other, 1):
            cost = min(rows[i - 1][j] + 1, row[j - 1] + 1, rows[i - 1][j - 1] + (letter != target))
            if i > 1 and j > 1 and letter == other[j - 2] and one[i - 2] == target:
                cost = min(cost, rows[i - 2][j - 2] + 1)
            row.append(cost)
        rows.append(row)
    return min(rows[-1][-1], limit + 1)
