"""`schema`: writes the JSON Schema of a recipe, for editors.

Inputs: where to write it. Outputs: the schema, and the exit code. Not here: what the schema says (`json_schema`).
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
        "schema [-o FILE]",
        "Write the JSON Schema of a recipe for the installed versions. Editors use it to complete keys.",
        example="schema -o trl_sft.schema.json",
    )
    parser.add_argument(
        "-o", "--output", metavar="FILE", type=Path, help="write the schema to a file instead of the terminal"
    )
    path = parser.parse_args(argv).output
    from trl_sft.cli.schema import json_schema

    schema = json_schema.build()
    text = json.dumps(schema, indent=1, ensure_ascii=False)
    json_output.add_values(schema=schema, output=path)
    if path is None:
        console.say(text)
        return errors.EXIT_DONE
    arguments.write_output("-o", path, f"{text}\n")
    line = f"# yaml-language-server: $schema={path.name}"
    console.say(f"wrote {path}. Put this line at the top of a recipe in the same folder: {line}")
    return errors.EXIT_DONE
