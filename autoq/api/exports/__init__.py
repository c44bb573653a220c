"""Checkpoints of plans: written, read back, recorded; and `compress`, which needs no study."""
