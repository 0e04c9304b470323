"""Recipes broken at random, on the command line: no traceback, no unknown key accepted, exit 2, the key named.

The operators are the functions of OPERATORS. `make test` tries a few hundred recipes, `make prove` ten thousand; the
seed is printed, and is part of the message of a failure.
"""

import json
import random
import re
import time
from collections import Counter
from pathlib import Path

import pytest

from trl_sft import cli
from trl_sft.recipe import renamed_keys, sections
from trl_sft.recipe.upstream import keys

ROOT = Path(__file__).parents[2]
BASE = """\
model:
  name_or_path: trl_sft:tiny
  dtype: float32
tokenizer:
  chat_template: chatml
data:
  train:
    path: rows.jsonl
    format: question_answer
  eval_fraction: 0.2
  overlong: drop
train:
  output_dir: out
  max_steps: 20
  learning_rate: 1e-3
  max_length: 128
  packing: true
  per_device_train_batch_size: 4
  weight_decay: 0.01
  lr_scheduler_type: cosine
  logging_steps: 5
  seed: 7
lora:
  r: 4
  lora_alpha: 8
  lora_dropout: 0.1
  target_modules: all-linear
evaluate:
  max_rows: 8
  generation:
    max_new_tokens: 8
run:
  resume: auto
  max_hours: 2
"""
LINES = BASE.splitlines()
KEYS = [(n, *re.fullmatch(r"( *)(\w+):(.*)", line).groups()) for n, line in enumerate(LINES)]
LEAVES = [(n, indent, key, value) for n, indent, key, value in KEYS if value and key != "max_new_tokens"]
NUMBERS = [leaf for leaf in LEAVES if re.fullmatch(r" [\d.e-]+", leaf[3])]
KNOWN = {name for section in sections.OWNERS for name in keys.get_fields(section)}
KNOWN |= {*sections.OWNERS, *sections.OWN_KEYS["data.*"], *keys.get_source_fields("json"), "generation"}
KNOWN |= {name for names in renamed_keys.RENAMED_KEYS.values() for name in names} | {"max_new_tokens"}


def replace_line(n, line):
    """Return the recipe with another text for one line; None = without the line."""
    return "\n".join([*LINES[:n], *([line] if line is not None else []), *LINES[n + 1 :]]) + "\n"


def drop(rng):
    """Remove a required key."""
    n, key = rng.choice([(1, "name_or_path"), (7, "path")])
    return replace_line(n, None), key


def double(rng):
    """Write a key twice."""
    n, _, key, _ = rng.choice(LEAVES)
    return replace_line(n, f"{LINES[n]}\n{LINES[n]}"), key


def swap(rng):
    """Write a word where a number is due."""
    n, indent, key, _ = rng.choice([leaf for leaf in NUMBERS if leaf[2] not in ("seed", "max_hours")])
    return replace_line(n, f"{indent}{key}: cosine"), key


def letters(rng):
    """Transpose two letters of a key, or remove, double or replace one."""
    while True:
        n, indent, key, value = rng.choice([leaf for leaf in KEYS if len(leaf[2]) > 1])
        i = rng.randrange(len(key) - 1)
        wrong = rng.choice([
            key[:i] + key[i + 1] + key[i] + key[i + 2 :],
            key[:i] + key[i + 1 :],
            key[:i] + key[i] + key[i:],
            key[:i] + rng.choice("abcdefghijklmnopqrstuvwxyz_") + key[i + 1 :],
        ])  # fmt: skip
        if wrong not in KNOWN and not re.fullmatch(r"\d+|true|false|null|~", wrong):
            return replace_line(n, f"{indent}{wrong}:{value}"), wrong


def other_section(rng):
    """Write a key under a section that does not own it."""
    _n, _, key, value = rng.choice([leaf for leaf in LEAVES if leaf[1] == "  "])
    owners = {s for s in sections.OWNERS if key in keys.get_fields(s)}
    at = rng.choice([m for m, indent, section, _ in KEYS if not indent and section not in owners | {"data"}])
    return replace_line(at, f"{LINES[at]}\n  {key}:{value}"), key


def wrong_type(rng):
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[2] not in ("target_modules", "path", "seed")])
    return replace_line(n, f"{indent}{key}: {rng.choice(['{a: 1}', '[[1], [2]]', '[{a: b}]'])}"), key


def deeper(rng):
    n, indent, key, value = rng.choice([leaf for leaf in LEAVES if leaf[2] not in ("path",)])
    return replace_line(n, f"{indent}{key}:\n{indent}  {key}:{value}"), key


def tab(rng):
    n, _indent, key, value = rng.choice([leaf for leaf in KEYS if leaf[1]])
    return replace_line(n, f"\t{key}:{value}"), key


def byte_order_mark(rng):
    """Put a byte order mark into the middle of the file; at its start, it is not part of the text."""
    n, indent, key, value = rng.choice(LEAVES)
    return replace_line(n, f"{indent}\ufeff{key}:{value}"), key


def anchor(rng):
    """Write an alias of nothing, or an anchor that contains itself."""
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[2] != "path"])
    return replace_line(n, f"{indent}{key}: {rng.choice(['*nothing', '&a [*a]', '&a {b: *a}'])}"), key


def merge_key(rng):
    n, indent, key, value = rng.choice(LEAVES)
    return replace_line(n, f"{indent}<<: {{{key}:{value}}}\n{LINES[n]}"), "<<"


def python_object(rng):
    n, indent, key, _ = rng.choice(LEAVES)
    tag = rng.choice(["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk=", "!x 3"])
    return replace_line(n, f"{indent}{key}: {tag}"), key


def alias_bomb(rng):
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[1] == "  "])
    bomb = "".join(f"{indent}  k{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))
    return replace_line(n, f"{indent}{key}:\n{bomb.rstrip()}"), key


def too_large(rng):
    n, indent, key, _ = rng.choice(NUMBERS)
    return replace_line(n, f"{indent}{key}: {rng.choice(['1e400', '-1e999', '.inf', '.nan', '9' * 5000])}"), key


def below(rng):
    """Write -0 or less where a number above 0 is needed."""
    above = ("max_steps", "max_length", "per_device_train_batch_size", "logging_steps", "r", "max_rows", "max_hours")
    n, indent, key, _ = rng.choice([leaf for leaf in LEAVES if leaf[2] in above])
    return replace_line(n, f"{indent}{key}: {rng.choice(['-0', '0', '-5'])}"), key


def long_scalar(rng):
    n, indent, key, _ = rng.choice([leaf for leaf in NUMBERS if leaf[2] != "seed"])
    size = rng.choice([10**4, 10**5, 10**7] if rng.random() < 0.05 else [10**4])
    return replace_line(n, f"{indent}{key}: {'x' * size}"), key


def nul(rng):
    n, indent, key, value = rng.choice(LEAVES)
    return replace_line(n, rng.choice([f"{indent}{key}\0:{value}", f"{indent}{key}:{value}\0"])), key


OPERATORS = [
    *(drop, double, swap, letters, letters, letters, other_section, wrong_type, deeper, tab, byte_order_mark, anchor),
    *(merge_key, python_object, alias_bomb, too_large, below, long_scalar, nul),
]


def try_broken_recipes(number, seed, capsys):
    """Check broken recipes on the command line; count whether the messages name the key."""
    counts = Counter()
    for n in range(number):
        rng = random.Random(f"{seed}:{n}")
        operator = OPERATORS[n % len(OPERATORS)]
        text, key = operator(rng)
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        at = f"seed {seed}:{n}, {operator.__name__}, {key}"
        began = time.perf_counter()
        code = cli.main(["check", "recipe.yaml", "--fast"])
        assert time.perf_counter() - began < 60, at
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err, at
        assert code == 2, f"{at}\n{text[:2000]}\n{out}"
        assert len(err) < 20_000, at
        line = next((i for i, one in enumerate(text.splitlines(), 1) if one != (LINES + [""] * 99)[i - 1]), 0)
        named = key in err or re.search(rf"recipe\.yaml:{line}\b", err)
        counts["named" if named else f"not named by {operator.__name__}"] += 1
    return counts


def test_unbroken_recipe_is_accepted(here, capsys):
    for text in (BASE, "\ufeff" + BASE):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert cli.main(["check", "recipe.yaml", "--fast"]) == 0, capsys.readouterr().err


def test_broken_recipes_are_refused_by_name(here, capsys):
    counts = try_broken_recipes(10 * len(OPERATORS), "few", capsys)
    assert counts["named"] >= 0.95 * sum(counts.values()), counts


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_broken_recipes_are_refused_by_name(here, capsys):
    seed = time.time_ns()
    counts = try_broken_recipes(10_000, seed, capsys)
    with capsys.disabled():
        print(f"\n10,000 broken recipes, seed {seed}: {json.dumps(counts)}")
    assert counts["named"] >= 9_500, (seed, counts)
