"""What the laptop and the box agree on: the only part of the trainer, with data and memory, that
ops reads."""
