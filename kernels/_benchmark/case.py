"""What one measurement is made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

Work = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Goal:
    """A figure to reach on one kind of hardware."""

    hardware: str
    """Part of the hardware's name, or "cpu" for any CPU with one thread."""
    figure: str
    """What is compared: teraflops, gigabytes_per_second, or a baseline's name, whose time over
    ours is."""
    good: float
    excellent: float | None = None

    def reached(self, value: float | None) -> str | None:
        """excellent, good or missed; None where the figure was not measured."""
        if value is None:
            return None
        if self.excellent is not None and value >= self.excellent:
            return "excellent"
        return "good" if value >= self.good else "missed"


@dataclass(frozen=True, slots=True)
class Prepared:
    """Operands in place: what to call, beside what, and how much work it is."""

    ours: Work
    baselines: Mapping[str, Work]
    logical_bytes: int
    """Read and written, each once, however often a kernel reads them."""
    operations: int = 0
    """Multiplications and additions of a matrix product; 0 of anything else."""
    before: Work | None = None
    """What to do, untimed, before each repetition."""


@dataclass(frozen=True, slots=True)
class Case:
    """One operation at one shape."""

    operation: str
    variant: str
    shape: Mapping[str, int]
    dtype: torch.dtype
    prepare: Callable[[torch.device], Prepared]
    compiles: bool = False
    """Whether there is a compiled body for CPUs."""
    goals: tuple[Goal, ...] = field(default=())

    @property
    def name(self) -> str:
        """For people."""
        size = " x ".join(str(count) for count in self.shape.values())
        return f"{self.operation}, {self.variant}, {size}"
