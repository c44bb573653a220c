"""The speeds that kernels are written for. None is a claim: a run says which were reached."""

from __future__ import annotations

from autoq.kernels._benchmark.case import Goal

_H200 = "H200"
_CPU = "cpu"

# A GPU's copy reads and writes the operation's bytes; our time over the copy's is the share of
# the memory's speed that is used.
QUANTIZE_FP8 = (Goal(_H200, "copy", 0.85, 0.92),)
QUANTIZE_NVFP4 = (Goal(_H200, "gigabytes_per_second", 2400.0, 3200.0),)
FAKE_QUANTIZE = (Goal(_H200, "copy", 0.80, 0.90),)
FAKE_QUANTIZE_FP8_TENSOR = (*FAKE_QUANTIZE, Goal(_CPU, "clone", 0.5))
FAKE_QUANTIZE_NVFP4 = (*FAKE_QUANTIZE, Goal(_CPU, "naive", 8.0))

_SQUARE = 8192


def of_product(operation: str, variant: str, m: int, n: int, k: int) -> tuple[Goal, ...]:
    """The goals of a matrix product [m, k] x [n, k]."""
    if operation == "fp8.matmul" and variant == "row" and m == n == k == _SQUARE:
        return (Goal(_H200, "teraflops", 1200.0, 1350.0),)
    if operation == "w4a8.linear" and m <= 64:
        return (Goal(_H200, "scaled_mm_fp8", 1.4),)
    if operation == "nvfp4.linear" and variant == "input as it is" and m <= 16:
        return (Goal(_H200, "bf16", 2.5, 3.0),)
    return ()
