"""Container images on this side: what they are (definition, lock), their bytes (fetch, assemble), how they travel (bundle)."""
