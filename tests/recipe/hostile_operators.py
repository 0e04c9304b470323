"""Operators that break a recipe or a command line as an attacker, an editor or a copy from a web page does.

Each function takes a random generator and returns a `Broken`. What they return may still be a correct recipe (two
values that are swapped), so that exit code 0 is allowed.
"""

import os
import random
import socket
from typing import NamedTuple

from recipe_lines import BASE, KEYS, LEAVES, LINES, NUMBERS, replace_line

LOOKALIKES = {"a": "\u0430", "e": "\u0435", "o": "\u03bf", "p": "\u0440", "c": "\u0441", "x": "\u0445", "i": "\u0456"}
LOOKALIKES |= {"s": "\u0455", "n": "\uff4e", "t": "\U0001d42d"}  # of Cyrillic, Greek, wide and mathematical letters
INVISIBLE = ["\u200b", "\u200c", "\u200d", "\u2060", "\u00ad", "\ufeff", "\u00a0", "\u3000", "\u202e", "\u2028", "\x85"]


class Broken(NamedTuple):
    """A recipe, a command line and the words of which a message has to name one."""

    text: str | bytes
    words: tuple[str, ...]  # a message names one of them, or the line that differs
    overrides: tuple[str, ...] = ()


def swapped_values(rng):
    """Swap the values of two keys, maybe of two sections."""
    (n, indent, key, value), (m, other_indent, other_key, other_value) = rng.sample(LEAVES, 2)
    lines = list(LINES)
    lines[n], lines[m] = f"{indent}{key}:{other_value}", f"{other_indent}{other_key}:{value}"
    return Broken("\n".join(lines) + "\n", (key, other_key))


def lookalike(rng):
    """Write a letter of another script in a key or a value."""
    n, indent, key, value = rng.choice([leaf for leaf in KEYS if set(leaf[2]) & set(LOOKALIKES)])
    if set(value) & set(LOOKALIKES) and rng.random() < 0.3:
        letter = rng.choice([letter for letter in value if letter in LOOKALIKES])
        return Broken(replace_line(n, f"{indent}{key}:{value.replace(letter, LOOKALIKES[letter], 1)}"), (key,))
    letter = rng.choice([letter for letter in key if letter in LOOKALIKES])
    wrong = key.replace(letter, LOOKALIKES[letter], 1)
    return Broken(replace_line(n, f"{indent}{wrong}:{value}"), (wrong, key))


def invisible(rng):
    """Put a character that nobody sees into a key or behind a value."""
    n, indent, key, value = rng.choice(KEYS)
    at, character = rng.randrange(len(key) + 1), rng.choice(INVISIBLE)
    line = f"{indent}{key[:at]}{character}{key[at:]}:{value}"
    if rng.random() < 0.3 and value:
        line = f"{indent}{key}:{value}{character}"
    return Broken(replace_line(n, line), (key, key[:at] + character + key[at:]))


def many_digits(rng):
    """Write a number of hundreds or thousands of digits."""
    n, indent, key, _ = rng.choice(NUMBERS)
    digits = rng.choice([19, 20, 40, 308, 309, 350, 399, 401, 4300, 5000, 20_000])
    number = rng.choice(["9" * digits, "-" + "9" * digits, "0." + "0" * digits + "1", f"1e{'9' * digits}"])
    number = rng.choice([number, "0x" + "f" * digits, "0o" + "7" * digits, "9" * digits + ".5", f"1e-{'9' * digits}"])
    return Broken(replace_line(n, f"{indent}{key}: {number}"), (key,))


def not_finite(rng):
    n, indent, key, _ = rng.choice(NUMBERS)
    return Broken(replace_line(n, f"{indent}{key}: {rng.choice(['.inf', '-.inf', '.nan', '.NaN', '1e309'])}"), (key,))


def odd_key(rng):
    """Write a key that is no text: a number, true, null, a date, a list."""
    n, indent, _, value = rng.choice(KEYS)
    odd = rng.choice(
        ["1", "-1", "0x1F", "1.5", "true", "null", "~", "2024-01-01", "12:30:45", ".nan", "''", '" "', "?"]
    )
    odd = rng.choice([odd, "[a, b]", "{a: b}", "- a", "9" * 500, "!!null ''", "&a x", "*a", "<<", "=", "0o7"])
    return Broken(replace_line(n, f"{indent}{odd}:{value or ' 3'}"), (odd, "key"))


def surrogate(rng):
    """Write half of a surrogate pair, as text or as a key."""
    n, indent, key, _ = rng.choice(LEAVES)
    value = rng.choice(['"\\ud800"', '"\\uD83D\\uDE00"', '"a\\udfffb"', '"\\x00"', '"\\e[31m"', '"\\U0010FFFF"'])
    line = f"{indent}{key}: {value}" if rng.random() < 0.8 else f"{indent}{value}: 1"
    return Broken(replace_line(n, line), (key, "\\ud800", "ud83d", "udfff", "x00", "x1b"))


def long_name(rng):
    """Write a path, a name or a key that no file system takes."""
    size = rng.choice([256, 300, 4096, 5000, 70_000])
    word = rng.choice(["a" * size, "a/" * (size // 2) + "b", "é" * (size // 2), "../" * (size // 3), "~" + "a" * size])
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[2] not in ("target_modules",)])
    line = f"{indent}{key}: {word}" if rng.random() < 0.8 else f"{indent}{word}: 1"
    return Broken(replace_line(n, line), (key, "aaaa", "éééé", "../.."))


def odd_path(rng):
    """Name what is no ordinary file: a loop of links, a pipe, a device, a folder, a file in place of a folder."""
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[2] in ("name_or_path", "path", "output_dir")])
    words = ["loop1", "loop1/x", "pipe", "./pipe", "/dev/zero", "/dev/null", "/dev/full", "rows.jsonl/x", "folder"]
    words += ["locked", "/proc/self/mem", "broken_link", '"a\\0b"', '"\\ud800"', '"a\\nb"', "'*'", "'[a-'", "~nobody/x"]
    words += ["'**/*'", "''", "' '", ".", "..", "/", "//", "'~'", "con:", "file:///etc/passwd", "pipe.jsonl", "socket"]
    return Broken(replace_line(n, f"{indent}{key}: {rng.choice(words)}"), (key,))


def odd_override(rng):
    """Write an override that is quoted oddly, or is none."""
    _, _, key, _ = rng.choice(LEAVES)
    dotted = rng.choice([f"train.{key}", f"lora.{key}", f"data.train.{key}", key, f"model.{key}.{key}"])
    broken = [f"{dotted}=", f"={dotted}", f"{dotted}.=1", f'{dotted}="', f"{dotted}='", f"{dotted}={{", f"{dotted}=["]
    broken += [
        f"{dotted}={{a: 'b}}",
        f'{dotted}="\'"\'"',
        f"{dotted}==1",
        f"{dotted}=a=b",
        f".{dotted}=1",
        "=",
        "..=",
        "a",
    ]
    broken += [f"{dotted}..x=1", f" {dotted} = 1", f"{dotted}=\n1", f"{dotted}=\t", f"{dotted}=a: b: c", f"{dotted}=*x"]
    broken += [f"{dotted}=&a [*a]", f"{dotted}=!!python/object:os.system 1", f"{dotted}=\x00", f"{dotted}=\ud800"]
    broken += [f"{dotted}={'9' * 5000}", f"{dotted}={'x' * 100_000}", f"{dotted}={'[' * 2000}", "a." * 20_000 + "b=1"]
    broken += [
        f"data.train.{'1' * 5000}.path=x",
        "data.train.-1.path=x",
        "data.train.0.path=x",
        "train.0=1",
        "0=1",
        "0.0=1",
    ]
    broken += [
        f"{dotted}=---\n...\n---",
        "model=null",
        "train=[1]",
        "data=",
        "train=",
        "null=1",
        "true.x=1",
        "<<.a=1",
        "<<=1",
    ]
    override = rng.choice(broken)
    if rng.random() < 0.1:
        override = rng.choice([f"--{dotted}=1", "--=1", "-x", "--", "---", "-", "--json=1", "--fast=no", "--on=", "@x"])
    words = (override.partition("=")[0][:40], dotted, key, "override", "section.key=value", override[:40], "argument")
    return Broken(BASE, words, (override,))


def encoding(rng):
    """Save the recipe in another encoding, or damage its bytes."""
    data = BASE.encode()
    at = rng.randrange(len(data))
    return Broken(
        rng.choice([
            BASE.encode("utf-16"), BASE.encode("utf-16-le"), BASE.encode("utf-32"), b"\xff\xfe" + data,
            data[:at] + b"\xff" + data[at:], data[:at] + b"\xed\xa0\x80" + data[at:], data[:at] + b"\x00" + data[at:],
            data[:at] + b"\x1a" + data[at:], data[:at] + b"\x7f" + data[at:], b"\x1f\x8b" + data, data[:at] + b"\xc3",
            b"\x89PNG\r\n", b"PK\x03\x04" + data,
        ]),
        ("recipe.yaml",),
    )  # fmt: skip


def line_ends(rng):
    """End the lines as another system does; the recipe may stay correct."""
    return Broken(BASE.replace("\n", rng.choice(["\r\n", "\r", "\n\r", "\x0b", "\x0c", "\u2029"])), ("recipe.yaml",))


def deep(rng):
    """Nest values hundreds or thousands of levels deep."""
    n, indent, key, _ = rng.choice(LEAVES)
    depth = rng.choice([30, 100, 500, 1000, 10_000])
    value = rng.choice(["[" * depth + "]" * depth, "{a: " * depth + "1" + "}" * depth, "[" * depth, "- " * depth + "x"])
    if rng.random() < 0.3:
        return Broken("".join("  " * i + "a:\n" for i in range(min(depth, 500))), ("a", "recipe.yaml"))
    return Broken(replace_line(n, f"{indent}{key}: {value}"), (key, "recipe.yaml"))


def bomb(rng):
    """Write aliases of aliases, merge keys of aliases, thousands of keys."""
    kind = rng.randrange(4)
    if kind == 0:
        lines = "".join(
            f"a{i}: &a{i} {{{', '.join(f'k{j}: *a{i - 1}' if i else 'k: 1' for j in range(9))}}}\n" for i in range(9)
        )
        return Broken(lines + BASE, ("a0", "recipe.yaml"))
    if kind == 1:
        return Broken(BASE + "x: &x {<<: *x}\n", ("recipe.yaml",))
    if kind == 2:
        return Broken(BASE + "".join(f"k{i}: {i}\n" for i in range(3000)), ("k0", "recipe.yaml"))
    return Broken(BASE + f"x: {{{', '.join(f'&a{i} k{i}: *a{i}' for i in range(50))}}}\n", ("recipe.yaml",))


def tag(rng):
    """Write a tag, which YAML gives a meaning of its own."""
    n, indent, key, value = rng.choice(LEAVES)
    name = rng.choice(["!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!binary", "!!set", "!!omap", "!!pairs"])
    name = rng.choice(
        [name, "!!python/tuple", "!!python/object/new:os.system", "!include", "!<tag:x>", "!", "!!", "!!str"]
    )
    return Broken(replace_line(n, f"{indent}{key}: {name}{rng.choice([value, ' x', ' [1]', ' {a: 1}'])}"), (key, "tag"))


def two_faults(rng):
    """Break a recipe twice."""
    first, second = rng.choice(TEXT_OPERATORS)(rng), odd_override(rng)
    return Broken(first.text, first.words + second.words, second.overrides)


def cut(rng):
    """Cut the recipe in the middle, or repeat or exchange parts of it."""
    at, end = sorted(rng.sample(range(len(BASE)), 2))
    text = rng.choice([BASE[:at], BASE[:at] + BASE[end:], BASE[at:], BASE + BASE[at:end], BASE[:at] + BASE[at:end] * 2])
    return Broken(text, ("recipe.yaml",))


def wild(rng):
    """Replace, insert or remove a few characters anywhere."""
    text = BASE
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(text))
        text = (
            text[:at]
            + rng.choice(["", *"{}[]:,&*!|>'\"%@`#-?\t\0\n \\", "é", "\ud7ff", "- ", ": ", "\n\n"])
            + text[at + rng.randint(0, 2) :]
        )
    return Broken(text, ("recipe.yaml",))


TEXT_OPERATORS = [swapped_values, lookalike, invisible, many_digits, odd_key, surrogate, long_name, tag]
HOSTILE = [*TEXT_OPERATORS, not_finite, odd_path, odd_path, odd_override, odd_override, odd_override, encoding]
HOSTILE += [line_ends, deep, bomb, two_faults, cut, wild]


def prepare_folder(folder):
    """Make what `odd_path` names: links in circles, a pipe, a socket, a folder, a file without permission."""
    (folder / "loop1").symlink_to("loop2")
    (folder / "loop2").symlink_to("loop1")
    (folder / "broken_link").symlink_to("nothing")
    for name in ("pipe", "pipe.jsonl"):
        os.mkfifo(folder / name)
    (folder / "folder").mkdir()
    (folder / "locked").touch(mode=0)
    with socket.socket(socket.AF_UNIX) as server:
        descriptor = os.open(folder, os.O_RDONLY)
        server.bind(f"/proc/self/fd/{descriptor}/socket")  # the path of a socket is short
        os.close(descriptor)


def break_recipe(seed, number):
    """Return the operator and what it makes of a number."""
    rng = random.Random(f"{seed}:{number}")
    operator = HOSTILE[number % len(HOSTILE)]
    return operator, operator(rng)
