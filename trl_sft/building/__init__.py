"""Instruction sets are built here: a spec becomes rows, which are generated, checked, balanced, split and augmented.

In: a spec, a generator. Out: files that a recipe reads. Deliberately not here: the command (`cli.build`), the client of
a server (`evaluation`), the checks of rows alone (`building.gates`).
"""
