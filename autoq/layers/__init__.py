"""Quantising a layer's weight and input, and running a model with an assignment in place."""

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
