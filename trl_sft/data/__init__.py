"""RunRows become prompt and completion, chat messages, or text.

In: the sources of a `Run`. Out: `rows.RunRows`, formatted rows with the order in which an epoch trains them.
Deliberately absent: tokens (`trl_sft.tokenization`).
"""
