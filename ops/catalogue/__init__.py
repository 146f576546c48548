"""Today's open models as data: what a plan needs to know of a model without network."""
