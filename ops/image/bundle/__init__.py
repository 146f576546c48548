"""From an image to the folder that is carried."""
