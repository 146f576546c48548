"""The fused decoder layer, its parts, and their eager twins."""
