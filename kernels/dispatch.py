"""Which implementation an operation takes on a device, and why: the one place that decides."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from enum import StrEnum
from functools import cache

import torch

from autoq.kernels._torch import compiled
from autoq.kernels.targets import Target, target_of


class Implementation(StrEnum):
    """A body that an operation can take; all give the same bits."""

    TORCH = "torch"
    """Vectorised torch: any device."""
    COMPILED = "compiled"
    """C++ loops from torch's inductor: large tensors on CPUs, once compiling them pays."""
    TRITON = "triton"
    """Triton kernels: NVIDIA GPUs of compute capability 8.0 and newer, AMD MI300 and MI350."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was chosen, and why in one sentence."""

    implementation: Implementation
    reason: str


def choose(device: torch.device) -> Choice:
    """The implementation that operations on tensors of `device` take."""
    if device.type == "cpu":
        return Choice(Implementation.TORCH, "triton has no CPU backend")
    if device.type != "cuda":
        return Choice(Implementation.TORCH, f"there are no kernels for {device.type} devices")
    return _choose_gpu(device)


def triton_target(device: torch.device) -> Target | None:
    """The target to launch triton kernels for on `device`; None where torch was chosen."""
    if choose(device).implementation is not Implementation.TRITON:
        return None
    return target_of(device)


def compiled_choices() -> dict[str, Choice]:
    """What large CPU tensors took so far in this process, by operation and dtype.

    The choice falls tensor by tensor; AUTOQ_CPU_COMPILE=never or always makes it for all.
    """
    return {
        f"{state.name}, {state.dtype}": Choice(
            Implementation.COMPILED if state.compiled else Implementation.TORCH, state.reason
        )
        for state in compiled.states()
    }


@cache
def _choose_gpu(device: torch.device) -> Choice:
    target = target_of(device)
    if target is None:
        return Choice(Implementation.TORCH, "this GPU is older than sm_80, or unknown")
    if importlib.util.find_spec("triton") is None:
        return Choice(Implementation.TORCH, "triton is not installed; pip install 'autoq[triton]'")
    return Choice(Implementation.TRITON, f"kernels for {target.name}")
