"""Rows become prompt and completion, chat messages, or text.

Inputs: the sources of a `Run`. Outputs: `rows.RunRows`, formatted rows with the order in which an epoch trains them.
A row goes one way: `rows` calls `pipeline` for each source, which reads it (`load`), decides how it is formatted
(`source_format`) and formats it (`formats`, with `messages` and `wordings`); then `rows` splits and mixes the sources.
Deliberately not here: tokens (`trl_sft.tokenization`).
"""
