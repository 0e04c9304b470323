"""A row goes from its file to its tokens through `data`, then `tokenization`, never back, in few containers.

One row holds a marker. A profiler notes every function of ours that gets the marker in an argument: as text, as
tokens, in a list, a mapping or a `Dataset`, or in an object of ours. A container is the innermost object of ours that
holds the row.
"""

import collections.abc
import dataclasses
import inspect
import itertools
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tokenizers
from conftest import jsonl
from datasets import Dataset
from trl import SFTConfig

import trl_sft
from trl_sft import load_recipe
from trl_sft.data import rows as data_rows
from trl_sft.data.pipeline import Split
from trl_sft.recipe import paths
from trl_sft.tokenization import build, tokenizer

PACKAGE = Path(trl_sft.__file__).parent
STORAGE = PACKAGE / "data" / "formatted_columns.py"  # how a row lies in a table of Arrow, whoever reads it: no step
MARKER = "wombat"
MOST_CONTAINERS = 6
SOURCES = {
    "chat": (
        "messages",
        [{"role": "user", "content": "one {}"}, {"role": "assistant", "content": "two {}"}] * 2,
        "{train: r.jsonl}",
    ),
    "question": (  # a question with its answer, rendered by the chat template: the quickstart's rows
        "question",
        "what is {}?",
        "{train: {path: r.jsonl, format: question_answer, rename: {again: answer}}}",
    ),
    "text": ("text", "once {} upon", "{train: r.jsonl}"),
    "two files": (
        "messages",
        [{"role": "user", "content": "one {}"}, {"role": "assistant", "content": "two {}"}],
        "{train: [{path: r.jsonl, weight: 1}, {path: r.jsonl, weight: 2}], eval: r.jsonl, drop_leaked: false}",
    ),
}


class Walk:
    """The functions of ours that get the marked row, in order, with the containers that it lies in."""

    def __init__(self, decode):
        self.decode, self.steps, self.lock = decode, [], threading.Lock()

    def note(self, frame, event, _):
        code = frame.f_code
        if event != "call" or not code.co_filename.startswith(str(PACKAGE)) or code.co_filename == str(STORAGE):
            return
        if not self.lock.acquire(blocking=False):
            return
        try:
            sys.setprofile(None)  # looking into arguments is no step of the row
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            holders = set().union(*(self.holders(frame.f_locals.get(name)) for name in names))
            if holders:
                package = Path(code.co_filename).relative_to(PACKAGE).parts[0]
                self.steps.append((package, f"{Path(code.co_filename).stem}.{code.co_name}", holders - {None}))
        finally:
            sys.setprofile(self.note)
            self.lock.release()

    def holders(self, value):
        """Return the classes of ours that hold the marker innermost; None among them where no class of ours does."""
        if isinstance(value, str):
            return {None} if MARKER in value else set()
        if isinstance(value, tokenizers.Encoding):
            return self.holders(value.ids)
        if isinstance(value, Dataset):
            return self.holders(value.with_format(None)[:])
        if isinstance(value, pa.Table | pa.RecordBatch):
            return self.holders(value.to_pydict())
        if isinstance(value, np.ndarray):
            return self.holders(value.tolist()) if value.dtype.kind in "iu" and value.ndim == 1 else set()
        if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
            known = [token for token in value if 0 <= token < 512]
            return {None} if MARKER in self.decode(known) else set()
        inside = set().union(*map(self.holders, self.parts(value)))
        if type(value).__module__.startswith("trl_sft") and None in inside:
            inside = inside - {None} | {type(value).__name__}
        return inside

    @staticmethod
    def parts(value):
        if isinstance(value, collections.abc.Mapping):
            return value.values()
        if isinstance(value, list | tuple | set | frozenset):
            return value
        if dataclasses.is_dataclass(value) and type(value).__module__.startswith("trl_sft"):
            return [getattr(value, field.name) for field in dataclasses.fields(value)]
        return []


@pytest.mark.parametrize("kind", SOURCES)
def test_row_goes_from_file_to_tokens_without_returning_to_a_package(kind, here):
    column, pattern, data = SOURCES[kind]
    jsonl(
        here / "r.jsonl",
        [{column: (text := filled(pattern, MARKER if n == 3 else str(n))), "again": text} for n in range(6)],
    )
    (here / "recipe.yaml").write_text(
        f"model: {{name_or_path: trl_sft:tiny}}\ndata: {data}\ntrain: {{output_dir: out}}\n", encoding="utf-8"
    )
    run = load_recipe("recipe.yaml")
    chat = tokenizer.load(run, [str(paths.EMBEDDED / "tiny")], 512)
    args = SFTConfig(output_dir="out", use_cpu=True, bf16=False, report_to="none", max_length=256)
    walk = Walk(chat.tokenizer.decode)
    threading.setprofile(walk.note)
    sys.setprofile(walk.note)
    try:
        rows = data_rows.load(run, chat.features)
        made = build.tokenize(run, chat, rows, args=args)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    assert walk.holders(made.train), "the tokens of the marked row are among those to train"
    packages = [package for package, _ in itertools.groupby(step[0] for step in walk.steps)]
    functions = list(dict.fromkeys(step[1] for step in walk.steps))
    containers = list(dict.fromkeys(name for step in walk.steps for name in sorted(step[2])))
    print(f"\n{kind}: packages {packages}; containers {containers}; functions {functions}")
    # floors: a walk that sees nothing proves nothing
    assert "pipeline.format_batch" in functions
    assert len([name for name in functions if name.startswith(("render.", "encode.", "cache."))]) >= 3
    assert "build.tokenize" in functions
    assert packages == ["data", "tokenization"]
    assert 2 <= len(containers) <= MOST_CONTAINERS, containers


def filled(pattern, words):
    if isinstance(pattern, str):
        return pattern.format(words)
    return [turn | {"content": turn["content"].format(words)} for turn in pattern]


def test_walk_notices_a_row_in_each_kind_of_argument():
    """What the walk sees, and what it does not: an argument that hides the row would pass for none."""
    ids = {"w": list(b"a wombat b")}
    walk = Walk(lambda numbers: bytes(n for n in numbers if n < 256).decode())
    split = Split(Dataset.from_dict({"text": [MARKER]}), (), *[np.arange(1)] * 3, {}, {}, "key")
    holding = [f"a {MARKER}", {"a": [MARKER]}, (MARKER,), Dataset.from_dict({"text": ["x", MARKER]}), ids, ids["w"]]
    assert all(walk.holders(value) == {None} for value in [*holding, np.array(ids["w"]), pa.table({"a": [MARKER]})])
    assert walk.holders(split) == {"Split"}
    assert walk.holders({"train": [split]}) == {"Split"}
    assert not any(walk.holders(value) for value in ["x", 3, None, [], {"a": 1}, np.arange(9), inspect])
