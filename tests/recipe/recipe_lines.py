"""A correct recipe, as lines and as keys, for the operators that break it."""

import re

BASE = """\
model:
  name_or_path: trl_sft:tiny
  dtype: float32
tokenizer:
  chat_template: chatml
data:
  train:
    path: rows.jsonl
    format: question_answer
  eval_fraction: 0.2
  overlong: drop
train:
  output_dir: out
  max_steps: 20
  learning_rate: 1e-3
  max_length: 128
  packing: true
  per_device_train_batch_size: 4
  weight_decay: 0.01
  lr_scheduler_type: cosine
  logging_steps: 5
  seed: 7
lora:
  r: 4
  lora_alpha: 8
  lora_dropout: 0.1
  target_modules: all-linear
evaluate:
  max_rows: 8
  generation:
    max_new_tokens: 8
run:
  resume: auto
  max_hours: 2
"""
LINES = BASE.splitlines()
KEYS = [(n, *re.fullmatch(r"( *)(\w+):(.*)", line).groups()) for n, line in enumerate(LINES)]
LEAVES = [(n, indent, key, value) for n, indent, key, value in KEYS if value and key != "max_new_tokens"]
NUMBERS = [leaf for leaf in LEAVES if re.fullmatch(r" [\d.e-]+", leaf[3])]


def replace_line(n, line):
    """Return the recipe with another text for one line; None = without the line."""
    return "\n".join([*LINES[:n], *([line] if line is not None else []), *LINES[n + 1 :]]) + "\n"
