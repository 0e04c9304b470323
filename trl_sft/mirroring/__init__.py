"""Checkpoints at a second place, `run.mirror`: an object store, the hub, or another disk.

Inputs: run folders. Outputs: verified copies of their checkpoints, from which a run goes on at a new host. Not here:
when a checkpoint is written (`training.mirror` follows the Trainer).
"""
