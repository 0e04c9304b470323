"""`build`: a spec becomes an instruction set that a recipe reads as it is.

Inputs: a spec and overrides. Outputs: the files of the set, lines on the terminal, and the exit code. Not here: the
build (`trl_sft.building`), its models (`models`) and its lines (`screen`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, json_output, upstream_warnings
from trl_sft.cli import arguments, resumable

_EXAMPLES = {"en": "english.yaml", "zh": "chinese.yaml"}
_EPILOG = """\
steps:
  1. python -m trl_sft build --example en -o instructions.yaml   write a ready spec (en: English, zh: Chinese)
  2. set generator.endpoint and generator.model to your server: vLLM, llama.cpp, Ollama, a hosted model, or
     `python -m trl_sft serve RUN`; a key is read from OPENAI_API_KEY. Without `endpoint` the model is a local one.
  3. python -m trl_sft build instructions.yaml --dry-run         count calls, tokens and cost; nothing is called
  4. python -m trl_sft build instructions.yaml plan.rows=20      a small set, to look at
  5. python -m trl_sft build instructions.yaml                   the set, with its card; the same command continues it
  6. train on it: the last line of the screen is the command

Every answer is kept in calls.jsonl of the output folder: a build that was stopped makes only the missing calls.
`python -m trl_sft schema --build -o trl_sft.build.schema.json` writes the schema of a spec for editors."""


def main(argv: Sequence[str]) -> int:
    """Build a set; return the exit code."""
    parser = arguments.create_parser(
        "build SPEC [section.key=value ...] [--dry-run]",
        "Build an instruction set: a model writes rows from topics and axes, gates check them, quotas balance them, "
        "and a card says what is in them.",
        example="build instructions.yaml --dry-run",
        epilog=_EPILOG,
    )
    parser.add_argument("spec", metavar="SPEC", nargs="?", type=Path, help="a YAML file")
    parser.add_argument(
        "overrides", metavar="section.key=value", nargs="*", help="replaces a value of the spec: plan.rows=20"
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="say the planned calls, tokens and cost, and call nothing"
    )
    parser.add_argument("--example", choices=sorted(_EXAMPLES), help="write a ready spec in this language to -o")
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="where --example goes; instructions.yaml by default"
    )
    options = parser.parse_intermixed_args(argv)
    if options.example:
        return _write_example(options)
    if options.spec is None:
        parser.print_help()
        return errors.EXIT_DONE
    if options.output is not None:
        fix = f"Write `output.folder={options.output}`: -o is the file of --example."
        raise errors.UsageError(errors.Fault("-o", "a build has no such option", fix, code="run.bad_option"))
    from trl_sft.building import spec as building_spec

    spec = building_spec.load_spec(options.spec, options.overrides)
    from trl_sft.cli.build import screen

    if options.dry_run:
        return screen.print_estimate(spec)
    with upstream_warnings.quiet(), resumable.explain_endings(spec.folder):
        from trl_sft.cli.build import models

        return models.run(spec)


def _write_example(options: argparse.Namespace) -> int:
    """Write a ready spec; return the exit code. Raises RecipeError if the file exists."""
    from trl_sft.building import templates

    path = options.output or Path("instructions.yaml")
    if path.exists():
        fix = "Name another file with -o, or remove this one."
        raise errors.RecipeError(errors.Fault(str(path), "the file exists", fix, code="run.file_exists"))
    text = (templates.FOLDER.with_name("specs") / _EXAMPLES[options.example]).read_text(encoding="utf-8")
    arguments.write_output("-o", path, text.replace("instructions.yaml", str(path)))
    json_output.add_values(output=path)
    console.say(f"wrote {path}. Set generator.endpoint and generator.model, then:")
    console.say(f"  {console.get_python_command()} -m trl_sft build {path} --dry-run")
    return errors.EXIT_DONE
