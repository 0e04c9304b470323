"""`schema`: writes the JSON Schema of a recipe, or of a spec of `build`, for editors.

Inputs: where to write it. Outputs: the schema, and the exit code. Not here: what the schema says (`json_schema`,
`spec_schema`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from trl_sft import console, errors, json_output
from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Write the schema; return the exit code."""
    parser = arguments.create_parser(
        "schema [--build] [-o FILE]",
        "Write the JSON Schema of a recipe for the installed versions. Editors use it to complete keys.",
        example="schema -o trl_sft.schema.json",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write the schema to a file instead of the terminal"
    )
    parser.add_argument("--build", action="store_true", help="write the schema of a spec of `build` instead")
    options = parser.parse_args(argv)
    path = options.output
    from trl_sft.cli.schema import json_schema, spec_schema

    schema = spec_schema.build() if options.build else json_schema.build()
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    json_output.add_values(schema=schema, output=path)
    if path is None:
        console.say(text)
        return errors.EXIT_DONE
    arguments.write_output("-o", path, f"{text}\n")
    line = f"# yaml-language-server: $schema={path.name}"
    kind = "spec" if options.build else "recipe"
    console.say(f"wrote {path}. Put this line at the top of a {kind} in the same folder: {line}")
    return errors.EXIT_DONE
