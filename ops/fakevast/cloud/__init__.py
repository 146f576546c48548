"""The state machine of the emulated vast.ai: pure, its time comes from a clock."""
