"""Vectorised torch on any device; operands were checked by the contract modules."""
