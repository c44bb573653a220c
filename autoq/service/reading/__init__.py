"""What the store has, as replies; loads no torch."""
