"""What a plan may take, as users say it, in one frozen value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from autoq.errors import InputError
from autoq.formats import Target
from autoq.search import Budget, Resource
from autoq.search.hardware import GPUS
from autoq.search.kernel_times import read_kernel_times
from autoq.search.latency import LatencyModel, Roofline

DEFAULT_EFFECTIVE_BITS = 4.8
BYTES_PER_GB = 1e9
MILLISECONDS_PER_SECOND = 1e3


@dataclass(frozen=True, kw_only=True)
class Budgets:
    """Limits on one plan; all of them hold.

    Args:
        effective_bits: mean bits per searched weight, codes and block scales.
        max_gb: of all weights of the checkpoint, layers that are not searched included, in 10^9
            bytes.
        max_active_bits: mean bits per weight that a token touches.
        max_latency_ms: predicted time of the searched layers' products in one step.
        max_kl: KL divergence to the original, in nats per token; the smallest such plan is wanted.
        gpu: whose latency is predicted, one of `autoq.search.hardware.GPUS`.
        latency_table: measured kernels, a file that `autoq kernels bench --json` wrote; they count
            instead of the GPU's datasheet.
        latency_tokens: tokens of one step: one per sequence in decoding, all in prefill.
    Raises:
        InputError: a limit is no positive number, or latency is limited on no hardware.
        UnknownNameError: nothing is known of the GPU; the message lists near misses.
    """

    effective_bits: float | None = None
    max_gb: float | None = None
    max_active_bits: float | None = None
    max_latency_ms: float | None = None
    max_kl: float | None = None
    gpu: str | None = None
    latency_table: str | Path | None = None
    latency_tokens: int = 1

    def __post_init__(self) -> None:
        for name, value in self.stated.items():
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} must be a positive number, got {value:g}")
        if self.latency_tokens < 1:
            raise InputError(f"latency_tokens must be >= 1, got {self.latency_tokens}")
        if self.gpu is not None:
            GPUS[self.gpu]
        if self.max_latency_ms is not None and self.gpu is None and self.latency_table is None:
            raise InputError(
                "a latency is that of some hardware: name it with --gpu (known: "
                f"{', '.join(sorted(GPUS))}), or give measured kernels with --latency-table"
            )

    @property
    def stated(self) -> dict[str, float]:
        """The limits that were given, by name."""
        names = ("effective_bits", "max_gb", "max_active_bits", "max_latency_ms", "max_kl")
        values = {name: getattr(self, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    @property
    def limits(self) -> tuple[Budget, ...]:
        """The limits on resources, in their own units; `max_kl` is none of them."""
        amounts = {
            Resource.EFFECTIVE_BITS: self.effective_bits,
            Resource.STORED_BYTES: _times(self.max_gb, BYTES_PER_GB),
            Resource.ACTIVE_BITS: self.max_active_bits,
            Resource.LATENCY: _times(self.max_latency_ms, 1 / MILLISECONDS_PER_SECOND),
        }
        return tuple(
            Budget(resource=resource, limit=limit)
            for resource, limit in amounts.items()
            if limit is not None
        )

    @cached_property
    def latency(self) -> LatencyModel | None:
        """What predicts times; None where no hardware was named.

        Raises:
            InputError: the latency table cannot be used.
        """
        if self.latency_table is not None:
            return read_kernel_times(Path(self.latency_table))
        return None if self.gpu is None else Roofline(GPUS[self.gpu])

    def label(self, rules: Sequence[str] = ()) -> str:
        """How the plan for these budgets is called: plans are found by it, so with all digits."""
        units = {
            "effective_bits": "bits",
            "max_gb": "GB",
            "max_active_bits": "active bits",
            "max_latency_ms": "ms",
        }
        stated = self.stated
        parts = [
            f"{_digits(stated[name])} {unit}" for name, unit in units.items() if name in stated
        ]
        if self.max_kl is not None:
            parts.append(f"KL {_digits(self.max_kl)}")
        if self.latency is not None:
            parts.append(f"{self.latency.name} at {self.latency_tokens} tokens")
        if rules:
            parts.append(f"rules {'; '.join(rules)}")
        return ", ".join(parts)

    def details(self) -> dict[str, Any]:
        """What a stored plan keeps of the budgets beside its limits, as plain data."""
        found: dict[str, Any] = {}
        if self.max_kl is not None:
            found["max_kl"] = self.max_kl
            # The plan's own budgets hold what it was found to take at least, too.
            found["asked"] = {budget.resource: budget.limit for budget in self.limits}
        if self.latency is not None:
            found["latency"] = {
                "model": self.latency.name,
                "hardware": self.latency.hardware,
                "tokens": self.latency_tokens,
            }
        return found


def budgets_or_default(budgets: Budgets) -> Budgets:
    """The budgets, or where none is stated those of a search that was told nothing."""
    if budgets.stated:
        return budgets
    return replace(budgets, effective_bits=DEFAULT_EFFECTIVE_BITS)


def required_budgets(budgets: Budgets) -> Budgets:
    """The budgets.

    Raises:
        InputError: none is stated.
    """
    if not budgets.stated:
        raise InputError(
            "a plan needs a budget; give effective_bits, max_gb, max_active_bits, max_latency_ms "
            "or max_kl"
        )
    return budgets


def gpu_of(
    target: Target,
    gpu: str | None,
    latency_table: str | Path | None,
    max_latency_ms: float | None,
) -> str | None:
    """The GPU whose latency is predicted: the one that is named, or the target's where one is due.

    Raises:
        InputError: the target's hardware is wanted, and nothing is known of its speed.
    """
    if gpu is not None or latency_table is not None or max_latency_ms is None:
        return gpu
    if target.hardware.name not in GPUS:
        raise InputError(
            f"the speed of {target.hardware.name} is not known; name a GPU that is with --gpu "
            f"({', '.join(sorted(GPUS))}), or give measured kernels with --latency-table"
        )
    return target.hardware.name


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _digits(value: float) -> str:
    """A wider budget's plan may not fit this one: nothing is rounded away."""
    short = f"{value:g}"
    return short if float(short) == value else repr(value)
