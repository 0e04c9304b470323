"""The keys of a spec, as data: type, default, range and help of each; the only place that declares them.

Inputs and outputs: none; the check of a spec, its JSON Schema and the reference page read these tables. Not here: rules
on several keys at once (`spec`), and the names of axes, which a spec chooses freely.
"""

from __future__ import annotations

from typing import Any, NamedTuple

LANGUAGES = ("en", "zh")
FAMILIES = ("basic", "multi_turn", "task", "chain_of_thought")
AUGMENTATIONS = ("paraphrase", "easier", "harder", "format", "context")
AXES, PLAN, SEEDS, TEMPLATES, GENERATOR, BUDGET = "axes", "plan", "seeds", "templates", "generator", "budget"
GATES, JUDGE, BALANCE, AUGMENTATION, OUTPUT = "gates", "judge", "balance", "augmentation", "output"
FAMILY = "family"  # the axis that every spec has: the family of the template
TOPIC = "topic"


class SpecKey(NamedTuple):
    """One key of a section."""

    type: str  # as Python writes it
    default: Any  # None = no value
    help: str
    least: float | None = None  # the smallest value
    most: float | None = None  # the largest value
    is_above: bool = False  # whether `least` itself is refused
    is_required: bool = False

    def describe_range(self) -> str:
        """Return the range of a number in words; "" = it has none."""
        if self.least is None:
            return ""
        words = f"above {self.least:g}" if self.is_above else f"from {self.least:g}"
        return f", {words}" + (f" to {self.most:g}" if self.most is not None else "")


_SHARES = "list[str] | dict[str, float]"
_MODEL_KEYS = {
    "endpoint": SpecKey(
        "str",
        None,
        "The address of a server with OpenAI's protocol, up to /v1. Unset: `model` is a model on this machine.",
    ),
    "model": SpecKey(
        "str",
        None,
        "The name of the model at the server; without `endpoint` a folder, a hub id or trl_sft:tiny.",
        is_required=True,
    ),
    "temperature": SpecKey("float", 0.8, "The temperature of sampling; 0 is greedy.", least=0),
    "top_p": SpecKey("float", None, "Sample from the most likely tokens with this share.", least=0, most=1),
    "max_tokens": SpecKey("int", 1024, "The most tokens of one answer.", least=1),
    "options": SpecKey("dict[str, Any]", {}, "Further fields of each request, passed on unchanged."),
    "concurrent": SpecKey("int", 8, "How many calls are under way at once.", least=1, most=1000),
    "retries": SpecKey(
        "int", 4, "Further attempts of a call after a timeout, a 429 or an error of the server.", least=0, most=20
    ),
    "first_wait": SpecKey(
        "float", 1.0, "Seconds before the second attempt; each later wait is twice as long.", least=0
    ),
    "seconds": SpecKey("float", 300.0, "How long one attempt may take, in seconds.", least=0, is_above=True),
    "input_price": SpecKey("float", None, "The price of a million tokens of prompts.", least=0),
    "output_price": SpecKey("float", None, "The price of a million tokens of answers.", least=0),
}
SECTIONS: dict[str, dict[str, SpecKey]] = {
    PLAN: {
        "rows": SpecKey("int", None, "How many rows the set has before augmentation.", least=1, is_required=True),
        "language": SpecKey(
            "Literal['en', 'zh']", "en", "The language of the templates, which every row has to have too."
        ),
        "seed": SpecKey("int", 0, "Chooses cells, topics, templates, the split and the seeds of calls.", least=0),
        "surplus": SpecKey(
            "float", 1.0, "Rows to write for each row of the set; the balance then takes the best.", least=1, most=10
        ),
        "attempts": SpecKey("int", 3, "How often a row is written, until one passes the gates.", least=1, most=20),
        "student": SpecKey(
            "str", None, "The model that will be trained: its tokenizer counts lengths, and the recipe names it."
        ),
    },
    SEEDS: {
        "topics": SpecKey(
            "str | list[str] | dict[str, list[str]]",
            None,
            "Topics: a list, a .txt file with one on each line, or a mapping from a value of the axis `domain` to its "
            "topics.",
        ),
        "rows": SpecKey("str", None, "A JSONL file of rows: examples for templates, and problems with a known answer."),
    },
    AXES: {},
    TEMPLATES: {
        "families": SpecKey(
            _SHARES, list(FAMILIES), f"Families of templates, or a share for each: {', '.join(FAMILIES)}."
        ),
        "files": SpecKey("list[str]", [], "Files with templates of your own, which replace those of their family."),
    },
    GENERATOR: _MODEL_KEYS,
    BUDGET: {
        "calls": SpecKey(
            "int", None, "The most calls of the whole build, those of earlier processes counted.", least=1
        ),
        "money": SpecKey(
            "float", None, "The most money of the whole build; needs the prices of the models.", least=0, is_above=True
        ),
    },
    GATES: {
        "max_tokens": SpecKey(
            "int", 1024, "The most tokens of a row, by the tokenizer of `plan.student`; without it, words.", least=1
        ),
        "novelty": SpecKey(
            "bool", True, "Reject a request too similar to an earlier one (ROUGE-L above 0.7, as Self-Instruct does)."
        ),
        "reject_refusals": SpecKey("bool", True, "Reject rows with an answer that begins as a refusal does."),
        "evaluation": SpecKey(
            "list[str]", [], "JSONL files of evaluation sets: rows that hold a prompt of theirs are rejected."
        ),
    },
    JUDGE: _MODEL_KEYS
    | {
        "temperature": SpecKey("float", 0.0, "The temperature of sampling; 0 is greedy.", least=0),
        "max_tokens": SpecKey("int", 512, "The most tokens of one judgement.", least=1),
        "min_score": SpecKey("float", 3.0, "Rows whose lowest score is below this are rejected.", least=1, most=5),
    },
    BALANCE: {
        "by": SpecKey(
            "list[str]", None, "The axes whose cells are balanced. Unset: task, domain and difficulty, those there are."
        ),
        "target": SpecKey(
            "Literal['planned', 'equal']",
            "planned",
            "planned: each cell has at most the rows of its quota. equal: all cells have the same number.",
        ),
        "min_score": SpecKey("float", None, "Rows with a lower score of the judge are not taken.", least=1, most=5),
        "min_rows": SpecKey(
            "int", None, "Each cell gets so many rows first, if it has them; a cell with fewer is a shortfall.", least=1
        ),
    },
    AUGMENTATION: {
        "methods": SpecKey(
            "list[Literal['paraphrase', 'easier', 'harder', 'format', 'context']]",
            list(AUGMENTATIONS),
            "How new rows are made from rows of the set.",
        ),
        "multiple": SpecKey(
            "float", 2.0, "The most rows of a part of the set after augmentation, as a multiple.", least=1, most=20
        ),
        "max_children": SpecKey("int", 2, "The most rows that are made from one row.", least=1, most=20),
        "held_out": SpecKey("bool", False, "Also augment the held-out rows; their children are held out too."),
    },
    OUTPUT: {
        "folder": SpecKey("str", None, "The folder of the set. Unset: data/NAME, by the name of the spec."),
        "format": SpecKey("Literal['jsonl', 'parquet']", "jsonl", "The form of the files of rows."),
        "eval_fraction": SpecKey(
            "float", 0.1, "The share of the rows that is held out, in eval.jsonl; 0 = none.", least=0, most=0.9
        ),
    },
}
REQUIRED = (PLAN, SEEDS, GENERATOR)
HELP = {
    PLAN: "How many rows, in which language.",
    SEEDS: "What the rows are about: topics, or rows. One of the two is needed.",
    AXES: "What varies: each axis has values, as a list or with a share each. A value may be a mapping with `share` "
    "and `description`. The shipped specs have task, domain, difficulty and style.",
    TEMPLATES: "Which templates write the rows.",
    GENERATOR: "The model that writes the rows.",
    BUDGET: "When to stop.",
    GATES: "Which rows are rejected.",
    JUDGE: "A model that scores each row from 1 to 5 by a rubric. Leave the section out for none.",
    BALANCE: "Which rows are taken, where there are more than planned.",
    AUGMENTATION: "New rows from rows of the set, made after the split. Leave the section out for none.",
    OUTPUT: "Where the set goes.",
}
AXIS_VALUE = {
    "share": SpecKey("float", 1.0, "The share of the rows with this value, relative to the others.", least=0),
    "description": SpecKey("str", "", "What the value means, for the prompts."),
}


def get_default(section: str, name: str) -> Any:
    """Return the default of a key; lists and mappings are new ones."""
    default = SECTIONS[section][name].default
    return default.copy() if isinstance(default, list | dict) else default
