"""Says from its raw bytes what a data file is, and what to write where it cannot be read as it stands.

`diagnose` is the entry: a cheap look at the head of a file before it is read, and a full look after a reader failed.
`content` knows other kinds of file by their first bytes, `encodings` the encoding of a text, `json_text` and `table`
what is wrong with JSON and with CSV. Each fault names file and line, as an editor counts lines. Deliberately not
here: reading rows (`trl_sft.data.load`), and what columns mean.
"""
