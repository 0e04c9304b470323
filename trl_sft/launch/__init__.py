"""Starts the processes of a run with torchrun, on one host or several, and answers for them with one exit code."""
