"""What the log of a run says: findings with numbers and advice, phases of the loss, a first verdict. All pure."""
