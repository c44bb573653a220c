"""Quantising a layer's weight and input, and running a model with an assignment in place."""

from autoq.layers._types import LayerCalibration, QuantizedWeight

__all__ = ["LayerCalibration", "QuantizedWeight"]
