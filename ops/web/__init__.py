"""A local page of all runs: what it shows, and the server that shows it."""
