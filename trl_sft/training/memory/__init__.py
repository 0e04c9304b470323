"""The memory that a training step takes, estimated on fake tensors and measured.

In: a `Run` and the batch that the trainer would build. Out: bytes of weights, gradients, optimizer state,
activations and logits, compared with what the machine has.
"""
