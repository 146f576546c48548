"""Programs that convert other people's weights, for people to run before a training."""
