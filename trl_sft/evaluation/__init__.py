"""Answers of the base model and of the tuned model to held-out prompts, and their metrics.

In: live models, prompts, references. Out: `eval.json` and `samples.jsonl`. Deliberately absent: training.
"""
