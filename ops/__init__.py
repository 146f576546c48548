"""The laptop side: rents, pushes, follows, pulls, destroys. Never imports torch."""
