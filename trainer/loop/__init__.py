"""What every stage has in common: steps, guards, checkpoints, resume, and the processes that share
them."""
