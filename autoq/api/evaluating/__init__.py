"""Originals, plans and checkpoints measured and judged beside each other."""
