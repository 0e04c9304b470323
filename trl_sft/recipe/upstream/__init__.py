"""Which keys the installed TRL, transformers, peft, datasets and torch accept, with types, defaults and help.

Inputs: the installed packages' sources. Outputs: a `fields.Field` for each key. The packages are not imported.
"""
