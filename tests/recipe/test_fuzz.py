"""Recipes broken at random, through the command line: no traceback, no unknown key taken, exit 2, the key named.

The operators are the functions of OPERATORS. `make test` draws a few hundred, `make prove` ten thousand; the seed is
printed and stands in the name of what fails.
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


def put(n, line):
    return "\n".join([*LINES[:n], *([line] if line is not None else []), *LINES[n + 1 :]]) + "\n"


def drop(draw):
    """A key that has to be there."""
    n, key = draw.choice([(1, "name_or_path"), (7, "path")])
    return put(n, None), key


def double(draw):
    n, _, key, _ = draw.choice(LEAVES)
    return put(n, f"{LINES[n]}\n{LINES[n]}"), key


def swap(draw):
    """The values of two keys, of a number and of a word."""
    n, indent, key, _ = draw.choice([leaf for leaf in NUMBERS if leaf[2] not in ("seed", "max_hours")])
    return put(n, f"{indent}{key}: cosine"), key


def letters(draw):
    """Two letters of a key transposed, one dropped, one doubled, or another in its place."""
    while True:
        n, indent, key, value = draw.choice([leaf for leaf in KEYS if len(leaf[2]) > 1])
        i = draw.randrange(len(key) - 1)
        wrong = draw.choice([
            key[:i] + key[i + 1] + key[i] + key[i + 2 :],
            key[:i] + key[i + 1 :],
            key[:i] + key[i] + key[i:],
            key[:i] + draw.choice("abcdefghijklmnopqrstuvwxyz_") + key[i + 1 :],
        ])  # fmt: skip
        if wrong not in KNOWN and not re.fullmatch(r"\d+|true|false|null|~", wrong):
            return put(n, f"{indent}{wrong}:{value}"), wrong


def other_section(draw):
    """A key under a section that does not own it."""
    _n, _, key, value = draw.choice([leaf for leaf in LEAVES if leaf[1] == "  "])
    owners = {s for s in sections.OWNERS if key in keys.get_fields(s)}
    at = draw.choice([m for m, indent, section, _ in KEYS if not indent and section not in owners | {"data"}])
    return put(at, f"{LINES[at]}\n  {key}:{value}"), key


def wrong_type(draw):
    n, indent, key, _ = draw.choice([leaf for leaf in LEAVES if leaf[2] not in ("target_modules", "path", "seed")])
    return put(n, f"{indent}{key}: {draw.choice(['{a: 1}', '[[1], [2]]', '[{a: b}]'])}"), key


def deeper(draw):
    n, indent, key, value = draw.choice([leaf for leaf in LEAVES if leaf[2] not in ("path",)])
    return put(n, f"{indent}{key}:\n{indent}  {key}:{value}"), key


def tab(draw):
    n, _indent, key, value = draw.choice([leaf for leaf in KEYS if leaf[1]])
    return put(n, f"\t{key}:{value}"), key


def byte_order_mark(draw):
    """In the middle of the file; at its beginning it is none of the text."""
    n, indent, key, value = draw.choice(LEAVES)
    return put(n, f"{indent}\ufeff{key}:{value}"), key


def anchor(draw):
    """An alias of nothing, or an anchor that contains itself."""
    n, indent, key, _ = draw.choice([leaf for leaf in LEAVES if leaf[2] != "path"])
    return put(n, f"{indent}{key}: {draw.choice(['*nothing', '&a [*a]', '&a {b: *a}'])}"), key


def merge_key(draw):
    n, indent, key, value = draw.choice(LEAVES)
    return put(n, f"{indent}<<: {{{key}:{value}}}\n{LINES[n]}"), "<<"


def python_object(draw):
    n, indent, key, _ = draw.choice(LEAVES)
    tag = draw.choice(["!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!binary aGk=", "!x 3"])
    return put(n, f"{indent}{key}: {tag}"), key


def alias_bomb(draw):
    n, indent, key, _ = draw.choice([leaf for leaf in LEAVES if leaf[1] == "  "])
    bomb = "".join(f"{indent}  k{i}: &a{i} [{', '.join([f'*a{i - 1}' if i else 'x'] * 10)}]\n" for i in range(9))
    return put(n, f"{indent}{key}:\n{bomb.rstrip()}"), key


def too_large(draw):
    n, indent, key, _ = draw.choice(NUMBERS)
    return put(n, f"{indent}{key}: {draw.choice(['1e400', '-1e999', '.inf', '.nan', '9' * 5000])}"), key


def below(draw):
    """-0 or less, where something above is needed."""
    above = ("max_steps", "max_length", "per_device_train_batch_size", "logging_steps", "r", "max_rows", "max_hours")
    n, indent, key, _ = draw.choice([leaf for leaf in LEAVES if leaf[2] in above])
    return put(n, f"{indent}{key}: {draw.choice(['-0', '0', '-5'])}"), key


def long_scalar(draw):
    n, indent, key, _ = draw.choice([leaf for leaf in NUMBERS if leaf[2] != "seed"])
    size = draw.choice([10**4, 10**5, 10**7] if draw.random() < 0.05 else [10**4])
    return put(n, f"{indent}{key}: {'x' * size}"), key


def nul(draw):
    n, indent, key, value = draw.choice(LEAVES)
    return put(n, draw.choice([f"{indent}{key}\0:{value}", f"{indent}{key}:{value}\0"])), key


OPERATORS = [
    *(drop, double, swap, letters, letters, letters, other_section, wrong_type, deeper, tab, byte_order_mark, anchor),
    *(merge_key, python_object, alias_bomb, too_large, below, long_scalar, nul),
]


def broken(number, seed, capsys):
    """Try `number` broken recipes; return the counts."""
    counts = Counter()
    for n in range(number):
        draw = random.Random(f"{seed}:{n}")
        operator = OPERATORS[n % len(OPERATORS)]
        text, key = operator(draw)
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


def test_base_is_taken(here, capsys):
    for text in (BASE, "\ufeff" + BASE):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert cli.main(["check", "recipe.yaml", "--fast"]) == 0, capsys.readouterr().err


def test_broken_recipes_are_refused_by_name(here, capsys):
    counts = broken(10 * len(OPERATORS), "few", capsys)
    assert counts["named"] >= 0.95 * sum(counts.values()), counts


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_ten_thousand_broken_recipes_are_refused_by_name(here, capsys):
    seed = time.time_ns()
    counts = broken(10_000, seed, capsys)
    with capsys.disabled():
        print(f"\n10,000 broken recipes, seed {seed}: {json.dumps(counts)}")
    assert counts["named"] >= 9_500, (seed, counts)
