"""What the importers' tests read off a recipe's text and off the outcomes of settings."""

import yaml

from trl_sft.importers import writer
from trl_sft.importers.settings import RecipeLine
from trl_sft.recipe import yaml_reader


def read_lines(out):
    """Return the values of a recipe's text by `section.key`."""
    sections = yaml.load(out, Loader=yaml_reader._Loader)
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def join_comments(out):
    """Return a recipe's text on one line, without the signs of its comments."""
    return " ".join(out.replace("#", "").split())


def outcomes_of(name, tool, settings):
    """Return the outcomes that come from one setting."""
    outcomes = writer.convert_all(writer.TOOLS[tool], settings)
    return [
        outcome
        for outcome in outcomes
        if name in (outcome.names if isinstance(outcome, RecipeLine) else [outcome.name])
    ]
