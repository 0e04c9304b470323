"""Readers of data files that infer no types: every row arrives as it stands in its file.

Inputs: files of JSON, CSV or text, plain or compressed. Outputs: blocks of rows, each the text of one JSON object, with
the line on which it begins. Deliberately not here: what a row means, and files that have types of their own (Parquet,
Arrow), which `datasets` reads.
"""
