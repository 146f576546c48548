"""The HTTP side of the emulated vast.ai."""
