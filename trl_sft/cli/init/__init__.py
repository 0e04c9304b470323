"""`init`: writes a first recipe for a model and a file of rows.

Inputs: a model, rows, and where the recipe goes. Outputs: the recipe, and the exit code. Not here: what the recipe
says (`recipe_writer`).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trl_sft.cli import arguments


def main(argv: Sequence[str]) -> int:
    """Write a recipe; return the exit code."""
    parser = arguments.create_parser(
        "init MODEL DATA [-o RECIPE]",
        "Write a commented recipe for a model and a file of rows. The columns of the rows are recognised.",
        example="init Qwen/Qwen2.5-0.5B-Instruct my-rows.jsonl -o recipe.yaml",
    )
    parser.add_argument("model", metavar="MODEL", help="a folder, a hub id, or trl_sft:tiny")
    parser.add_argument("data", metavar="DATA", help="a JSON, JSONL, CSV, Parquet or text file, a folder, or a hub id")
    parser.add_argument(
        "-o",
        "--output",
        metavar="RECIPE",
        type=Path,
        default=Path("recipe.yaml"),
        help="where to write the recipe; recipe.yaml by default",
    )
    options = parser.parse_args(argv)
    from trl_sft.cli.init import recipe_writer

    return recipe_writer.write(options.model, options.data, options.output)
