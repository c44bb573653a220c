"""Which engine runs which format on which GPUs: a module for each family of formats.

vLLM's and SGLang's records are compared with what their own code answers on a CPU for a described
GPU, from 7.5 to 12.0: configuration, methods, choice of kernels, loading
(`tests/export/engine_golden`); their kernels were not run. TensorRT-LLM was read, not run: loaders, kernels' guards and documentation.
transformers was executed on a CPU. Versions are those of `autoq.formats._places.ENGINES`.
"""

from __future__ import annotations

from autoq.formats._places import Support
from autoq.formats._support import double, fp8, int4, int8, mx, none, nvfp4, svdquant, weight_only

SUPPORT: tuple[Support, ...] = tuple(
    record
    for family in (none, fp8, nvfp4, svdquant, int4, double, int8, weight_only, mx)
    for record in family.support()
)
"""Every cell once: engine x container x format x compute capability."""
