"""One file for each training stage: what its batches are, what its loss is, what it hands over at
the end."""
