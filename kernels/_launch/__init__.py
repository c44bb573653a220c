"""Launch wrappers: allocate, choose the grid, start a kernel of `autoq.kernels._jit`.

Operands were checked by the contract modules. A wrapper does no arithmetic, takes the target as an
argument and never asks the driver, so that one process can compile for all targets.
"""
