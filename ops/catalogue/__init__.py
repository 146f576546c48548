"""Today's open models as data: what the plan must know of a model when there is no network."""
