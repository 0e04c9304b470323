"""`audit`: says what is in a set of rows, which rows have a fault, and writes a cleaned set.

Inputs: a file, a folder, a hub id or a recipe, and options. Outputs: tables on the terminal, an HTML page, a cleaned
set with the list of what was removed, and the exit code. Not here: the gates (`building.gates`), the audit itself
(`building.audit`) and the page (`reports.audit_page`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_sft import errors, json_output, user_paths
from trl_sft.cli import arguments, option_numbers

_EPILOG = """\
gates that remove rows under --fix: form, empty, length (with --max-tokens), complete, artefact, language, personal,
  leakage (with --against), duplicate. novelty, conflict and names (with
  --names) are notes. --keep GATE makes a note of any gate.
Without --model lengths are counted in words, and in characters of Chinese and Japanese."""
_LANGUAGES_BY_SCRIPT = ("en", "zh")  # which their script alone tells from each other
_RECIPE_SUFFIXES = (".yaml", ".yml")
_MODEL = "trl_sft:tiny"  # stands in a recipe of rows alone; its tokenizer is not read


def main(argv: Sequence[str]) -> int:
    """Audit rows; return the exit code."""
    options = parse(argv)
    from trl_sft import disk, upstream_warnings

    with upstream_warnings.quiet():
        from trl_sft.cli.audit import auditing

        try:
            json_output.add_values(**auditing.run(options))
        except OSError as error:
            fault = disk.explain(error, [path for path in (options.fix, options.output) if path])
            if fault is None:
                raise
            raise errors.RecipeError(fault) from None
    return errors.EXIT_DONE


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Return the arguments of the command. Raises RecipeError."""
    parser = arguments.create_parser(
        "audit DATA [--model MODEL] [--against FILE] [-o PAGE] [--fix FILE]",
        "Say what is in a set of rows and which rows have a fault: form, empty and cut answers, traces of generators, "
        "language, personal data, duplicates, leakage of evaluation sets. DATA is what a recipe reads, or a recipe.",
        example="audit rows.jsonl --against test.jsonl -o audit.html --fix clean.jsonl",
        epilog=_EPILOG,
    )
    from trl_sft.building.audit import gate_names
    from trl_sft.building.gates import language_names

    add = parser.add_argument
    add("data", metavar="DATA", help="a JSON, JSONL, CSV, Parquet or text file, a folder, a hub id, or a recipe")
    add("--model", metavar="MODEL", help="lengths are counted in the tokens of this model; with a recipe, of its own")
    add("--max-tokens", metavar="N", type=int, help="reject longer rows; train.max_length of a recipe by default")
    add(
        "--against", metavar="FILE", action="append", default=[], help="an evaluation set; data.eval of a recipe always"
    )
    add(
        "--language",
        metavar="CODE",
        choices=tuple(language_names.NAMES),
        default="",
        help="the language that every answer must have: en, zh; with trl-sft[data] also ar, de, es, fr, ja, ru, ...",
    )
    add(
        "--names",
        metavar="MODEL",
        help="note rows with names of people by presidio; MODEL: a package or folder of spaCy",
    )
    add(
        "--keep",
        metavar="GATE",
        action="append",
        default=[],
        choices=gate_names.REMOVING,
        help="only note what GATE finds",
    )
    add("-o", "--output", metavar="PAGE", type=Path, help="write an HTML page with the tables and the rows")
    add(
        "--fix",
        metavar="FILE",
        type=Path,
        help="write the rows without fault as JSONL; those removed stand beside them",
    )
    options = parser.parse_args(argv)
    _check(options)
    options.is_recipe = Path(options.data).suffix.lower() in _RECIPE_SUFFIXES
    options.model = options.model or ("" if options.is_recipe else None)
    options.stand_in = _MODEL
    return options


def _check(options: argparse.Namespace) -> None:
    """Check numbers, the language and the outputs. Raises UserError."""
    from trl_sft.building.gates import language_names

    if faults := option_numbers.list_faults({"--max-tokens": (options.max_tokens, 1)}):
        raise errors.RecipeError(faults)
    if options.language not in ("", *_LANGUAGES_BY_SCRIPT):
        from trl_sft.evaluation import eval_packages

        where = f"--language {options.language}"
        eval_packages.require_packages(where, language_names.PACKAGE, extra="trl-sft[data]")
    for name, path in (("--output", options.output), ("--fix", options.fix)):
        if path is not None:
            user_paths.check(name, path, user_paths.FILE, is_output=True)
