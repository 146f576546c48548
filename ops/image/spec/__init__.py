"""What an image is: its definition, its lock, its budget, where its files lie."""
