"""Launch wrappers: allocate, choose the grid, start a kernel of `autoq.kernels._jit`.

Operands were checked by the contract modules. A wrapper does no arithmetic, takes the target as an
argument and never asks the driver, so that one process can compile for all targets.
"""

import os

# Whether products are fused with sums where a kernel does not say: on up to triton 3.9, off from
# 3.10. Said here, before the first launch, so that all versions compile the same; the user's own
# setting stays. Kernels whose bits matter leave nothing to fuse.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
