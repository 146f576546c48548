"""What a run leaves: adapters and their use."""
