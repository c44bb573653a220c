"""The vocabulary of number formats: what exists, what it costs in bits, and where it loads."""

from autoq.formats._builtin import FORMATS, portable_formats
from autoq.formats._container import Container
from autoq.formats._format import (
    NONE,
    ActivationScheme,
    CalibrationAlgorithm,
    CalibrationMethod,
    FormatName,
    QuantFormat,
    StorageBits,
    WeightElement,
    WeightScaling,
)
from autoq.formats._places import ENGINES, HARDWARE, Engine, Hardware, Support, Verdict
from autoq.formats._targets import (
    Target,
    all_supports,
    containers_for,
    feasible_formats,
    offered_formats,
    parse_target,
    reasons,
    support,
)

__all__ = [
    "ENGINES",
    "FORMATS",
    "HARDWARE",
    "NONE",
    "ActivationScheme",
    "CalibrationAlgorithm",
    "CalibrationMethod",
    "Container",
    "Engine",
    "FormatName",
    "Hardware",
    "QuantFormat",
    "StorageBits",
    "Support",
    "Target",
    "Verdict",
    "WeightElement",
    "WeightScaling",
    "all_supports",
    "containers_for",
    "feasible_formats",
    "offered_formats",
    "parse_target",
    "portable_formats",
    "reasons",
    "support",
]
