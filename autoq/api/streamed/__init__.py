"""Searching models that no memory holds, a block at a time."""
