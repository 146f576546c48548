"""What the lock pins, brought onto this disk by hash. The only room that uses a network."""
