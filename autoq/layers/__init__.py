"""Quantising a layer's weight and input, and running a model with an assignment in place."""

from __future__ import annotations

from typing import TYPE_CHECKING

from autoq.lazy import names_from

if TYPE_CHECKING:
    from autoq.layers._types import LayerCalibration, LowRank, QuantizedWeight
    from autoq.layers.quantize import (
        Container,
        dequantize_weight,
        fake_quantize_input,
        fake_quantize_weight,
        quantize_weight,
    )

__all__ = [
    "Container",
    "LayerCalibration",
    "LowRank",
    "QuantizedWeight",
    "dequantize_weight",
    "fake_quantize_input",
    "fake_quantize_weight",
    "quantize_weight",
]


__getattr__ = names_from(
    __name__,
    {
        "autoq.layers._types": ("LayerCalibration", "LowRank", "QuantizedWeight"),
        "autoq.layers.quantize": (
            "Container",
            "dequantize_weight",
            "fake_quantize_input",
            "fake_quantize_weight",
            "quantize_weight",
        ),
    },
)
