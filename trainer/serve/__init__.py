"""Talking to a result."""
