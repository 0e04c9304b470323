"""Which keys the installed TRL, transformers, peft, datasets and torch accept, with types, defaults and help.

In: the installed packages' sources. Out: `fields.Field` for each key. No package is imported for it.
"""
