"""Definitions and lists of words are found in the source text of the installed packages."""

import ast

from trl_sft.recipe.upstream import source


def test_statement_whose_brackets_close_at_the_margin_is_found_whole():
    node = source.find_statement("torch.utils.checkpoint", "checkpoint")
    assert isinstance(node, ast.FunctionDef)
    assert node.end_lineno > 100
    assert source.find_statement("torch.utils.checkpoint", "no_such_name") is None
    assert source.resolve("trl.trainer.base_config", "TrainingArguments") == (
        "transformers.training_args",
        "TrainingArguments",
    )


def test_word_of_an_enumeration_imported_under_another_name_is_read():
    """torchrun writes `from torch.numa.binding import AffinityMode as _AffinityMode`."""
    assert source.resolve("torch.distributed.run", "_AffinityMode") == ("torch.numa.binding", "AffinityMode")
    assert "node" in source.read_listed_words("torch.distributed.run", "_AffinityMode")
