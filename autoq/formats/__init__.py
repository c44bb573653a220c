"""The vocabulary of number formats: what exists, what it costs in bits, and where it loads."""

from autoq.formats._builtin import FORMATS, portable_formats
from autoq.formats._format import (
    NONE,
    ActivationScheme,
    CalibrationAlgorithm,
    FormatName,
    QuantFormat,
    StorageBits,
    WeightElement,
)

__all__ = [
    "FORMATS",
    "NONE",
    "ActivationScheme",
    "CalibrationAlgorithm",
    "FormatName",
    "QuantFormat",
    "StorageBits",
    "WeightElement",
    "portable_formats",
]
