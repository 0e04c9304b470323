"""The run, from a checked recipe to a saved model.

In: a `Run`. Out: a run folder. `run.run` is read from top to bottom; the other modules do its steps.
"""
