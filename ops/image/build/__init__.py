"""From the fetched files to an image."""
