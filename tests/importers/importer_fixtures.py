"""Fixtures of the importers' tests: settings are imported through the command line."""

import json
import shlex

import pytest

from trl_sft import cli, load_recipe

DATASET_INFO = {
    "identity": {"file_name": "identity.json"},
    "renamed": {"file_name": "identity.json", "columns": {"prompt": "ask", "response": "say"}, "num_samples": 5},
    "chats": {"hf_hub_url": "org/chats", "formatting": "sharegpt", "split": "part", "columns": {"messages": "talk"}},
    "openai": {
        "hf_hub_url": "org/openai",
        "formatting": "sharegpt",
        "columns": {"messages": "messages"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"},
    },
    "pairs": {"hf_hub_url": "org/pairs", "ranking": True},
}


@pytest.fixture
def import_settings(here, capsys):
    """Import a command line of OpenRLHF, or a mapping or text as a file: exit code, standard output, standard error."""

    def call(tool, settings, *options):
        if tool == "openrlhf":
            words = ["--", *(shlex.split(settings) if isinstance(settings, str) else settings)]
        else:
            text = settings if isinstance(settings, str) else json.dumps(settings)
            (here / "config.yaml").write_text(text)
            words = ["config.yaml"]
        capsys.readouterr()
        code = cli.main(["import", tool, *options, *words])
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def import_recipe(import_settings, here):
    """Import settings without faults: the checked recipe, with overrides, and its text.

    `differs`: whether the recipe has to train something else than the settings; None = it may.
    """

    def call(tool, settings, *overrides, differs=None):
        for name in ("imported.yaml", "imported.jinja", "imported_rows.py"):
            (here / name).unlink(missing_ok=True)
        code, _, err = import_settings(tool, settings, "-o", "imported.yaml")
        assert code in ({True: [5], False: [0], None: [0, 5]}[differs]), err
        return load_recipe("imported.yaml", overrides), (here / "imported.yaml").read_text()

    return call


@pytest.fixture
def dataset_info(here):
    """A folder `data` with a dataset_info.json of LLaMA-Factory and one of its files."""
    (here / "data").mkdir()
    (here / "data" / "dataset_info.json").write_text(json.dumps(DATASET_INFO))
    rows = [{"instruction": "a", "input": "", "output": "b"}] * 8
    (here / "data" / "identity.json").write_text(json.dumps(rows))
