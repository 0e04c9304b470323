"""The model that SFTTrainer trains, and the device it trains on.

In: a `Run`. Out: keyword arguments for SFTTrainer, patches of upstream's models, the model on the meta device.
Deliberately absent: rows and the training loop.
"""
