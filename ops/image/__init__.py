"""Container images on this side: what they are (definition, lock), their bytes (fetch, build), how
they travel (bundle).
"""
