"""Settings broken at random, on the command line: no traceback, exit code 0, 2 or 5, and the place of what is wrong.

A break changes a value or a key of a configuration, or the bytes of its file. `make test` tries some for each tool,
`make prove` 500; a failure names the number of the break, which repeats it.
"""

import copy
import json
import random
import shlex
import sys
from collections import Counter

import pytest
import yaml
from test_every_leaf import CASES, FOLDER, TOOLS, list_leaves

from trl_sft import cli
from trl_sft.recipe import yaml_reader

NUMBERS = {"quick": 24, "long": 500}
INFO = {
    "rows": {"file_name": "rows.json", "columns": {"prompt": "ask", "response": "say"}, "num_samples": 5},
    "chats": {
        **{"hf_hub_url": "org/chats", "formatting": "sharegpt", "split": "part", "columns": {"messages": "talk"}},
        **{"tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "bot"}},
    },
}
# as Unicode escapes, so that an editor does not hide them
LOOK_ALIKE = dict(zip("aceopxyi", "\u0430\u0441\u0435\u043e\u0440\u0445\u0443\u0456", strict=True))  # Cyrillic
SEPARATORS = ("\u200b", "\ufeff", "\u202e", "\u00ad", "\u2028")
CONTROLS = ("\u0000", "\u0007", "\u001b[31m", "\r", "\u0085", "\u007f", "\u009b2J")
SURROGATES = ("\ud800", "\udfff", "a\ud83d")
WRONG_VALUES = (
    *(None, True, False, 0, -1, 7, 1.5, -0.5, 10**30, 1e308, float("inf"), float("nan"), "", " ", "x", "none", "7"),
    *([], {}, [None], [[]], [1, "a"], ["x", {"y": [1]}], {"x": None}, {"x": {"y": 1}}, {1: 2}, [{}], {"path": []}),
    *("x" * 5000, "a/b", "../..", "{", "{}", "{x", "%", "-", "#", "!x", "&a", "*a", "a: b", "\n", "\\", "'", '"'),
)


class Break:
    """The breaks of a file: each method changes the values of a configuration, and returns the file's text."""

    def __init__(self, rng, values):
        self.rng, self.values = rng, copy.deepcopy(values)

    def choose_leaf(self):
        """Return the mapping or the list that holds a random value, and the key of that value in it."""
        path = self.rng.choice([path for path in list_leaves(self.values) if path])
        inner = self.values
        for part in path[:-1]:
            inner = inner[part]
        return inner, path[-1]

    def write(self):
        """Return the values as YAML."""
        return dump(self.values)

    def set_value(self, value):
        """Put a value in the place of a random one."""
        inner, key = self.choose_leaf()
        inner[key] = value
        return self.write()

    def rename_key(self, change):
        """Change a random key."""
        inner, key = self.choose_leaf()
        if isinstance(inner, list):
            inner[key] = change(str(inner[key]))
        else:
            inner[change(str(key))] = inner.pop(key)
        return self.write()

    def change_character(self, change):
        """Change one character of a random key or a random text."""

        def insert(text):
            place = self.rng.randrange(len(text) + 1)
            return change(text, place)

        if self.rng.random() < 0.5:
            return self.rename_key(insert)
        inner, key = self.choose_leaf()
        inner[key] = insert(str(inner[key]))
        return self.write()

    def swap_values(self):
        (first, key), (second, other) = self.choose_leaf(), self.choose_leaf()
        first[key], second[other] = second[other], first[key]
        return self.write()

    def write_a_wrong_type(self):
        return self.set_value(self.rng.choice(WRONG_VALUES))

    def write_a_wrong_type_above(self):
        """Replace a whole mapping or list."""
        self.values[self.rng.choice(list(self.values))] = self.rng.choice(WRONG_VALUES)
        return self.write()

    def write_an_integer_key(self):
        inner, key = self.choose_leaf()
        target = self.rng.choice([self.values, inner])
        if isinstance(target, list):
            target[key] = {7: target[key]}
        else:
            target[self.rng.choice([0, 1, -3, 10**25])] = self.rng.choice(WRONG_VALUES)
        return self.write()

    def write_a_look_alike(self):
        return self.change_character(lambda text, _: "".join(LOOK_ALIKE.get(letter, letter) for letter in text))

    def write_a_separator(self):
        mark = self.rng.choice(SEPARATORS)
        return self.change_character(lambda text, place: text[:place] + mark + text[place:])

    def write_a_surrogate(self):
        mark = self.rng.choice(SURROGATES)
        return self.change_character(lambda text, place: text[:place] + mark + text[place:])

    def write_a_control_character(self):
        mark = self.rng.choice(CONTROLS)
        return self.change_character(lambda text, place: text[:place] + mark + text[place:])

    def write_thousands_of_digits(self):
        return self.set_value("DIGITS").replace('"DIGITS"', self.rng.choice(["", "-", "1."]) + "9" * 5000)

    def nest_deeply(self):
        depth = self.rng.choice([20, 90, 400, 3000])
        opened, closed = self.rng.choice([("[", "]"), ("{a: ", "}")])
        return self.set_value("DEEP").replace('"DEEP"', opened * depth + "1" + closed * depth)

    def write_a_circle(self):
        circle = self.rng.choice(["&a [*a]", "&a {b: *a}", "&a {path: x, type: *a}"])
        return self.set_value("CIRCLE").replace('"CIRCLE"', circle)

    def write_a_bomb(self):
        lines = ["x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]"]
        lines += [f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]" for n in range(1, 9)]
        return "\n".join([*lines, self.set_value("BOMB").replace('"BOMB"', "*x8")])

    def write_a_tag(self):
        tag = self.rng.choice(["!!python/object/apply:os.system [id]", "!x y", "!!binary aGk=", "!!int x", "!!set {a}"])
        return self.set_value("TAG").replace('"TAG"', tag)

    def write_a_key_twice(self):
        return self.write() + dump({self.rng.choice(list(self.values)): self.rng.choice(WRONG_VALUES)})

    def indent_with_tabs(self):
        lines = self.write().splitlines()
        number = self.rng.randrange(len(lines))
        lines[number] = "\t" + lines[number]
        return "\n".join(lines)

    def truncate(self):
        text = self.write()
        return text[: self.rng.randrange(len(text))]

    def repeat_a_part(self):
        text = self.write()
        start, end = sorted(self.rng.randrange(len(text)) for _ in range(2))
        return text[:end] + text[start:]

    def write_raw_bytes(self):
        data = bytearray(self.write().encode("utf-8", "surrogatepass"))
        for _ in range(self.rng.choice([1, 3, 200])):
            data[self.rng.randrange(len(data))] = self.rng.randrange(256)
        return bytes(data)

    def write_a_binary_file(self):
        return self.rng.choice(
            [self.rng.randbytes(800), bytes(300), b"\x1f\x8b" + self.rng.randbytes(80), b"", b"\xff"]
        )

    def write_another_encoding(self):
        return self.write().encode(self.rng.choice(["utf-16", "utf-32-le", "utf-8-sig"]), "surrogatepass")


BREAKS = [
    getattr(Break, name)
    for name in vars(Break)
    if name.startswith(("swap", "write_", "nest", "indent", "truncate", "repeat")) and name != "write"
]
assert len(BREAKS) >= 20


def dump(values):
    """Return settings as YAML, one setting a line, with escapes for all that is not ASCII."""
    lines = []
    for name, value in values.items():
        key = name if isinstance(name, int) else json.dumps(name)
        lines.append(f"{key}: {dump_value(value)}")
    return "\n".join(lines) + "\n"


def dump_value(value):
    """Return a value on one line; JSON would write keys that are numbers as texts."""
    if isinstance(value, dict):
        pairs = (f"{name if isinstance(name, int) else json.dumps(name)}: {dump_value(v)}" for name, v in value.items())
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(dump_value, value)) + "]"
    if isinstance(value, float):
        return yaml_reader.format_value(value)
    return json.dumps(value)


def read_configurations(tool):
    """Return the configurations of a tool that can be imported or broken: mappings with a value."""
    texts = [(FOLDER / f"{tool}.yaml").read_text(encoding="utf-8")]
    texts += [file.read_text(encoding="utf-8") for file in sorted((CASES / tool).glob("*.yaml"))]
    documents = [document for text in texts for document in yaml.load_all(text, Loader=yaml_reader._Loader)]
    return [document for document in documents if document]


def break_flags(rng, commands):
    """Return the words of a command with one of them broken."""
    words = shlex.split(rng.choice(commands))
    number = rng.randrange(len(words))
    word = words[number]
    place = rng.randrange(len(word) + 1)
    mark = rng.choice([*SEPARATORS, *SURROGATES, *CONTROLS[1:], "=", "--", "-", ".", "'", "{", "9" * 5000])
    changes = [
        [word[:place] + mark + word[place:]],
        [rng.choice(words)],
        ["".join(LOOK_ALIKE.get(letter, letter) for letter in word)],
        [str(rng.choice(WRONG_VALUES))],
        [word, str(rng.choice(WRONG_VALUES))],
        [],
        [word, word],
    ]
    return [*words[:number], *rng.choice(changes), *words[number + 1 :]]


def break_dataset_info(folder, change, rng):
    """Write a whole file of settings, and a broken dataset_info.json."""
    (folder / "config.yaml").write_text(dump({"model_name_or_path": "org/a", "dataset": ["rows", "chats"]}))
    broken = Break(rng, INFO)
    text = change(broken)
    data = text if isinstance(text, bytes) else json.dumps(broken.values).encode("utf-8", "surrogatepass")
    (folder / "dataset_info.json").write_bytes(data)


def import_settings(words, capsys):
    """Import, and return the exit code and everything on the screen; a traceback fails the test."""
    capsys.readouterr()
    try:
        code = cli.main(["import", *words])
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    return code, out + err


def describe_problem(code, screen, places):
    """Return what is wrong with the answer to a broken file; "" = nothing."""
    if code not in (0, 2, 5):
        return f"exit code {code}"
    if "Traceback" in screen:
        return "a traceback"
    if any(ord(character) < 32 and character != "\n" for character in screen) or any(
        "\ud800" <= c <= "\udfff" for c in screen
    ):
        return "a control character on the screen"
    if code == 2 and not any(f"\n{place}" in screen for place in places):
        return "no place"
    return ""


def try_breaks(tool, number, folder, capsys):
    """Break configurations of a tool; return what went wrong, and the count of each exit code."""
    problems, codes = [], Counter()
    configurations = [] if tool == "openrlhf" else read_configurations(tool)
    commands = [line for line in (FOLDER / "openrlhf.txt").read_text(encoding="utf-8").splitlines() if line]
    recipe = folder / "recipe.yaml"
    for seed in range(number):
        rng = random.Random(f"{tool} {seed}")
        for file in folder.glob("recipe*"):
            file.unlink()
        if tool == "openrlhf":
            words, name = ["openrlhf", "-o", "recipe.yaml", "--", *break_flags(rng, commands)], "flags"
        else:
            change = BREAKS[seed % len(BREAKS)]
            text = change(Break(rng, rng.choice(configurations)))
            name = change.__name__
            data = text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass")
            (folder / "config.yaml").write_bytes(data)
            if tool == "llamafactory" and rng.random() < 0.3:
                break_dataset_info(folder, change, rng)
            words = [tool, "config.yaml", "-o", "recipe.yaml"]
        try:
            code, screen = import_settings(words, capsys)
            problem = describe_problem(code, screen, ("config.yaml", "recipe.yaml", "openrlhf", "--", "dataset_info"))
        except Exception as error:  # the test names all of them
            code, screen, problem = None, repr(error), f"{type(error).__name__} in {last_frame(error)}"
        codes[code] += 1
        if recipe.exists():
            recipe.read_text(encoding="utf-8")
        if problem:
            problems.append(f"{seed} {name}: {problem}: {screen[:150]}")
    return problems, codes


def last_frame(error):
    """Return the file and the line in which an error was raised."""
    frame = error.__traceback__
    while frame.tb_next:
        frame = frame.tb_next
    return f"{frame.tb_frame.f_code.co_filename.rpartition('/')[2]}:{frame.tb_lineno}"


@pytest.mark.parametrize("tool", [*TOOLS, "openrlhf"])
def test_broken_settings_have_an_answer_without_a_traceback(tool, here, capsys):
    problems, codes = try_breaks(tool, NUMBERS["quick"], here, capsys)
    assert problems == []
    assert codes[2] > 5


@pytest.mark.long
@pytest.mark.parametrize("tool", [*TOOLS, "openrlhf"])
def test_500_broken_settings_have_an_answer_without_a_traceback(tool, here, capsys):
    problems, codes = try_breaks(tool, NUMBERS["long"], here, capsys)
    with capsys.disabled():
        print(f"{tool}: {dict(codes)}", file=sys.stderr)
    assert problems == []


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("1: no", "# - unknown: 1: false (trl_sft does not know this setting. Check its name.)"),
        ("1: {2: [3]}", "# - unknown: 1: {2: [3]} (trl_sft does not know this setting. Check its name.)"),
        (r'run_name: "a\u202e\u009b2J"', r'run_name: "a\u202e\u009b2J"'),
        (r'"a\e[31m\0": 1', r"# - unknown: a\x1b[31m\x00: 1 (trl_sft does not know this setting. Check its name.)"),
    ],
)
def test_strange_key_or_value_is_written_as_its_code(line, shown, here, capsys):
    (here / "config.yaml").write_text(f"model_name_or_path: trl_sft:tiny\ndataset_name: a/b\n{line}\n")
    code, screen = import_settings(["trl", "config.yaml", "-o", "recipe.yaml"], capsys)
    assert code in (0, 5), screen
    text = (here / "recipe.yaml").read_text(encoding="utf-8")
    assert shown in text
    assert describe_problem(code, screen, ()) == ""
    assert cli.main(["check", "recipe.yaml", "--fast"]) == 0
    assert import_settings(["trl", "config.yaml"], capsys)[1].startswith(text[:400])


def test_half_of_a_character_is_refused_with_its_line(here, capsys):
    (here / "config.yaml").write_text('model_name_or_path: a/b\ndataset_name: a/b\nrun_name: "a\\ud800"\n')
    code, screen = import_settings(["trl", "config.yaml", "-o", "recipe.yaml"], capsys)
    assert code == 2
    assert (
        "config.yaml:3 run_name\n    the text holds half a character (a lone surrogate)\n    -> Write the whole"
        in screen
    )
    assert not (here / "recipe.yaml").exists()
