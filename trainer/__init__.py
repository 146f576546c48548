"""The box side: trains an adapter from job.json. Never imports ops, never opens a socket of its own
accord."""
