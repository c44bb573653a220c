"""One launch to compile."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from autoq.kernels.targets import TARGETS, Target


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """One launch, the targets it is shipped for, and what must be found in the machine code."""

    operation: str  # "fp8.quantize"
    variant: str  # "per row, bfloat16"; with the tile, where there are several
    launch: Callable[[Target], object]  # makes its operands on the meta device
    targets: tuple[str, ...] = tuple(TARGETS)
    instructions: Mapping[str, str] = field(default_factory=dict)
    """Target -> regular expression that the assembly must match: its matrix or conversion unit."""
    allowed_spill_bytes: Mapping[tuple[str, str], int] = field(default_factory=dict)
    """(target, triton version "3.6") -> bytes per thread, where the compiler is known to spill."""

    @property
    def name(self) -> str:
        """Operation and variant."""
        return f"{self.operation} ({self.variant})"
