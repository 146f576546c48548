"""From files of rows to packed batches of tokens. Never imports torch, but for batch."""
