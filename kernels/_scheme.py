"""The ways of fake-quantising that are fused with scoring."""

from __future__ import annotations

from enum import StrEnum


class Scheme(StrEnum):
    """How a matrix [T, K] is quantised and dequantised."""

    FP8_TENSOR = "fp8_tensor"
    """E4M3 under one given scale."""
    FP8_ROW = "fp8_row"
    """E4M3, each row under its own scale."""
    NVFP4 = "nvfp4"
    """E2M1 in blocks of 16 columns under a given global scale."""
