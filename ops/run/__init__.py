"""One run: the story from rent to bill, and who owns it."""
