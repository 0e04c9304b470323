"""Recipes broken at random, on the command line: no traceback, no wait, no unknown key accepted, the key named.

The operators are the functions of OPERATORS, after which a recipe is wrong, and those of `hostile_operators`, after
which it may be right. `make test` tries a few of each, `make prove` 12,300; the seed is printed, and is part of the
message of a failure.
"""

import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from hostile_operators import HOSTILE, break_recipe, prepare_folder
from recipe_lines import BASE, KEYS, LEAVES, LINES, NUMBERS, replace_line

from trl_sft import cli, errors
from trl_sft.recipe import renamed_keys, sections
from trl_sft.recipe.upstream import keys

SECONDS = 20  # for one command
LONGEST_MESSAGE = 40_000  # characters
HOSTILE_COMMANDS = (  # what stands before and after the recipe and its overrides
    (("check",), ("--fast",)),
    (("explain",), ()),
    (("fix",), ("--fast",)),
    (("check",), ("--fast",)),
    (("import", "axolotl"), ()),
    (("import", "trl"), ()),
)
EXIT_CODES = {"check": (0, 2), "explain": (0, 2), "fix": (0, 2), "import": (0, 2, 5)}
KNOWN = {name for section in sections.OWNERS for name in keys.get_fields(section)}
KNOWN |= {*sections.OWNERS, *sections.OWN_KEYS["data.*"], *keys.get_source_fields("json"), "generation"}
KNOWN |= {name for names in renamed_keys.RENAMED_KEYS.values() for name in names} | {"max_new_tokens"}


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


@pytest.fixture
def time_limit():
    """Return a function that fails the test unless what follows ends within some seconds; 0 = no limit any more."""

    def give_up(*_):
        raise AssertionError("the command does not end")

    before = signal.signal(signal.SIGALRM, give_up)
    yield signal.alarm
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def run_command(arguments, at, *, capsys, time_limit):
    """Return the exit code and the messages of a command; a traceback, a wait or a flood of text fails."""
    time_limit(SECONDS)
    try:
        code = cli.main(arguments)
    except SystemExit as ended:  # argparse
        code = ended.code
    except Exception as error:
        raise AssertionError(at) from error
    time_limit(0)
    out, err = capsys.readouterr()
    assert "Traceback" not in out + err, at
    assert len(err) < LONGEST_MESSAGE, at
    return code, err


def try_broken_recipes(number, seed, *, capsys, time_limit):
    """Check broken recipes on the command line; count by operator whether the messages name the key."""
    counts = Counter()
    for n in range(number):
        rng = random.Random(f"{seed}:{n}")
        operator = OPERATORS[n % len(OPERATORS)]
        text, key = operator(rng)
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        at = f"seed {seed}:{n}, {operator.__name__}, {key}"
        code, err = run_command(["check", "recipe.yaml", "--fast"], at, capsys=capsys, time_limit=time_limit)
        assert code == 2, f"{at}\n{text[:2000]}"
        line = next((i for i, one in enumerate(text.splitlines(), 1) if one != (LINES + [""] * 99)[i - 1]), 0)
        named = key in err or re.search(rf"recipe\.yaml:{line}\b", err)
        counts[operator.__name__, "named" if named else "not named"] += 1
    return counts


def try_hostile_recipes(number, seed, *, capsys, time_limit):
    """Give hostile recipes and overrides to each command; count exit codes by operator, and whether the key is named.

    The exit code may be 0: swapped values, line ends of another system and tags in comments can leave a correct recipe.
    """
    counts = Counter()
    for n in range(number):
        operator, broken = break_recipe(seed, n)
        data = broken.text if isinstance(broken.text, bytes) else broken.text.encode("utf-8", "surrogatepass")
        Path("recipe.yaml").write_bytes(data)
        before, after = HOSTILE_COMMANDS[n % len(HOSTILE_COMMANDS)]
        overrides = () if before[0] == "import" else broken.overrides
        at = f"seed {seed}:{n}, {operator.__name__}, {before[0]}, {[word[:80] for word in broken.overrides]}"
        code, err = run_command([*before, "recipe.yaml", *overrides, *after], at, capsys=capsys, time_limit=time_limit)
        assert code in EXIT_CODES[before[0]], at
        outcome = f"exit {code}"
        if code == errors.EXIT_USER_ERROR:
            named = "recipe.yaml" in err or any(word and word in err for word in broken.words)
            outcome = "refused, named" if named else "refused, not named"
        counts[operator.__name__, outcome] += 1
        Path("recipe.fixed.yaml").unlink(missing_ok=True)
    return counts


def format_counts(counts):
    """Return a table: one line for each operator, one column for each outcome."""
    outcomes = sorted({outcome for _, outcome in counts})
    names = sorted({name for name, _ in counts})
    lines = [f"{name}: " + ", ".join(f"{outcome} {counts[name, outcome]}" for outcome in outcomes) for name in names]
    return "\n".join(lines)


def count_outcomes(counts, *outcomes):
    """Return how often one of the outcomes occurred."""
    return sum(number for (_, outcome), number in counts.items() if outcome in outcomes)


def test_unbroken_recipe_is_accepted(here, capsys):
    for text in (BASE, "\ufeff" + BASE):
        Path("recipe.yaml").write_text(text, encoding="utf-8")
        assert cli.main(["check", "recipe.yaml", "--fast"]) == 0, capsys.readouterr().err


def test_broken_recipes_are_refused_by_name(here, capsys, time_limit):
    counts = try_broken_recipes(3 * len(OPERATORS), "few", capsys=capsys, time_limit=time_limit)
    assert count_outcomes(counts, "named") >= 0.95 * sum(counts.values()), format_counts(counts)


def test_hostile_recipes_and_overrides_give_no_traceback(here, capsys, time_limit):
    prepare_folder(here)
    counts = try_hostile_recipes(3 * len(HOSTILE), "few", capsys=capsys, time_limit=time_limit)
    refused = count_outcomes(counts, "refused, named", "refused, not named")
    assert refused > 2 * len(HOSTILE), format_counts(counts)
    assert count_outcomes(counts, "refused, named") >= 0.95 * refused, format_counts(counts)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_ten_thousand_broken_recipes_are_refused_by_name(here, capsys, time_limit):
    seed = time.time_ns()
    counts = try_broken_recipes(10_000, seed, capsys=capsys, time_limit=time_limit)
    with capsys.disabled():
        print(f"\n10,000 broken recipes, seed {seed}:\n{format_counts(counts)}")
    assert count_outcomes(counts, "named") >= 9_500, seed


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_thousands_of_hostile_recipes_give_no_traceback(here, capsys, time_limit):
    seed = time.time_ns()
    prepare_folder(here)
    counts = try_hostile_recipes(2_300, seed, capsys=capsys, time_limit=time_limit)
    with capsys.disabled():
        print(f"\n2,300 hostile recipes, seed {seed}:\n{format_counts(counts)}")
    refused = count_outcomes(counts, "refused, named", "refused, not named")
    assert count_outcomes(counts, "refused, named") >= 0.99 * refused, seed
