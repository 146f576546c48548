"""GPUs and the drivers that serve them."""
