"""Formatted rows become token ids and labels.

In: `data.rows.Rows` and a tokenizer with its chat template. Out: the datasets that SFTTrainer receives, and the
ledger that counts every row and token. Deliberately absent: readers of files (`trl_sft.data`), the model.
"""
