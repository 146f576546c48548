"""Held-out rows and scores."""
