"""The machines of the emulated vast.ai: folders, processes and SSH."""
