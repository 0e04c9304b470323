"""A YAML recipe becomes a checked `Run`.

In: a file and overrides. Out: `checked.Run`, keyword arguments for each owner (TRL, transformers, peft,
datasets), or every fault at once. `build.build_run` is the entry. Deliberately absent: torch, tokenizers, rows.
"""
