"""The box side: trains an adapter from job.json. Never imports ops, never opens a socket of its own
accord."""

import logging

# its CPU backend says at each import that a faster kernel is not installed
logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
