"""From files of rows to packed batches of tokens. Only `batch` imports torch."""
