"""The base model, its loss and its answers."""
