"""What the importers' tests read off a recipe's text and off the outcomes of settings."""

import yaml

from trl_sft.importers import conversion as conversions
from trl_sft.importers import writer
from trl_sft.recipe import yaml_reader


def read_lines(out):
    """Return the values of a recipe's text by `section.key`."""
    sections = yaml.load(out, Loader=yaml_reader._Loader)
    return {f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()}


def join_comments(out):
    """Return a recipe's text on one line, without the signs of its comments."""
    return " ".join(out.replace("#", "").split())


def find_place(name, *path):
    """Return the place of a setting as its name alone."""
    return ".".join(map(str, (name, *path)))


def outcomes_of(name, tool, settings):
    """Return the outcomes that come from one setting, and the faults."""
    conversion = conversions.convert_all(writer.TOOLS[tool], settings)
    lines = [line for line in conversion.lines if name in line.names]
    return [*lines, *(item for item in conversion.omitted if item.name == name), *conversion.faults]
