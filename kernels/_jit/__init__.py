"""Triton kernels. Only `autoq.kernels._launch` imports this package: it needs triton."""
