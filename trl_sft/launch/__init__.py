"""Starts the processes of a run with torchrun or Ray, on one host or several, and answers with one exit code."""
