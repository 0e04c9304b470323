"""A YAML recipe becomes a checked `Run`.

Inputs: a file and overrides.
Outputs: `checked.Run`, with keyword arguments for each owner (TRL, transformers, peft, datasets); or every fault at
once. `yaml_reader.read_recipe` and `build.build_run` are the entry points.
Not here: torch, tokenizers, rows.
"""
