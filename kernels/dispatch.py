"""Which implementation an operation takes on a device, and why: the one place that decides."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Protocol, TypeAlias

import torch

from autoq.kernels._torch import compiled
from autoq.kernels.targets import Target, target_of


class Implementation(StrEnum):
    """A body that an operation can take; all but matrix products give the same bits."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one operation takes."""

    operation: str
    """`fp8.linear` is `autoq.kernels.fp8.linear`."""
    rows: str
    """Of products with how many rows it is said; empty where it holds for all."""
    choice: Choice


class _Variant(Protocol):
    """What the launch modules of matrix products answer."""

    @property
    def kernel(self) -> str: ...
    @property
    def reason(self) -> str: ...


_Answer: TypeAlias = Callable[[Target, int], str]


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


def answers(where: torch.device | Target) -> list[Answer]:
    """What every operation takes on a device, or would on a GPU that is not here.

    Some kernels are chosen by size; two products stand for all, one with 16 rows, one with 4096.
    """
    return [answer for operation in OPERATIONS for answer in _answers(operation, where)]


_ELEMENTWISE = ("quantize", "dequantize", "fake_quantize")
_FAMILIES = {
    "fp8": ("scales", *_ELEMENTWISE, "matmul", "linear"),
    "nvfp4": ("global_scale", *_ELEMENTWISE, "matmul", "linear"),
    "mxfp8": (*_ELEMENTWISE, "matmul", "linear"),
    "mxfp4": (*_ELEMENTWISE, "matmul", "linear"),
    "int4": ("group_scale", *_ELEMENTWISE, "linear"),
    "w4a8": ("tensor_scale", *_ELEMENTWISE, "linear"),
    "int8": (*_ELEMENTWISE, "matmul", "linear"),
    "scoring": (
        "fake_quantize_with_statistics",
        "input_statistics",
        "project",
        "project_weight",
    ),
}
OPERATIONS = tuple(f"{family}.{name}" for family, names in _FAMILIES.items() for name in names)
"""What the families offer, and this module answers for."""

_WITHOUT_KERNELS = {
    "int4.group_scale": "it is computed while quantising, and alone too rarely for a kernel",
}
"""Operation -> why it is torch everywhere."""

_COMPILED_ON_CPUS = tuple(f"{family}.fake_quantize" for family in _FAMILIES)


def _answers(operation: str, where: torch.device | Target) -> list[Answer]:
    if operation in _WITHOUT_KERNELS:
        choice = Choice(Implementation.TORCH, _WITHOUT_KERNELS[operation])
        return [Answer(operation=operation, rows="", choice=choice)]
    target = where if isinstance(where, Target) else target_of(where)
    choice = _choose_target(where) if isinstance(where, Target) else choose(where)
    if choice.implementation is not Implementation.TRITON or target is None:
        if where == torch.device("cpu") and operation in _COMPILED_ON_CPUS:
            choice = Choice(choice.implementation, f"{choice.reason}; {_compiled_reason()}")
        return [Answer(operation=operation, rows="", choice=choice)]
    variant = _variants().get(operation)
    if variant is None:
        return [Answer(operation=operation, rows="", choice=choice)]
    said = {str(rows): variant(target, rows) for rows in _ROWS}
    if len(set(said.values())) == 1:
        said = {"": next(iter(said.values()))}
    return [
        Answer(
            operation=operation, rows=rows, choice=Choice(Implementation.TRITON, kernel_and_reason)
        )
        for rows, kernel_and_reason in said.items()
    ]


def _compiled_reason() -> str:
    asked = compiled.policy()
    if asked is compiled.Policy.NEVER:
        return f"{compiled.POLICY_VARIABLE}=never keeps large tensors from compiled loops"
    when = "once that pays" if asked is compiled.Policy.AUTO else "at once"
    return f"large tensors take compiled loops {when} ({compiled.POLICY_VARIABLE}={asked})"


# The products that answers are given for: decoding and prefill, with a weight of 4096 x 4096.
_ROWS = (16, 4096)
_N = _K = 4096


def _variants() -> dict[str, _Answer]:
    """Operation -> which of its kernels a product of so many rows takes on a target, and why."""
    from autoq.kernels._launch import (
        fp8_matmul,
        int4_variant,
        int8_variant,
        mx_variant,
        nvfp4_variant,
    )
    from autoq.kernels._mx import E2M1, E4M3
    from autoq.kernels._scaling import Scaling

    def said(variant: Callable[..., _Variant], *arguments: object, **named: object) -> _Answer:
        def answer(target: Target, rows: int) -> str:
            found = variant(target, rows, _N, _K, *arguments, **named)
            return f"{found.kernel}: {found.reason}"

        return answer

    fp8 = said(fp8_matmul.variant, scaling=Scaling.ROW, out_dtype=torch.bfloat16)
    nvfp4 = said(nvfp4_variant.variant, quantized_input=True)
    mxfp8 = said(mx_variant.variant, E4M3, E4M3)
    return {
        "fp8.matmul": fp8,
        "fp8.linear": fp8,
        "nvfp4.matmul": nvfp4,
        "nvfp4.linear": nvfp4,
        "int4.linear": said(int4_variant.variant, int4_variant.Product.W4A16),
        "w4a8.linear": said(int4_variant.variant, int4_variant.Product.TWO_LEVEL),
        "int8.linear": said(int8_variant.variant),
        "mxfp8.matmul": mxfp8,
        "mxfp8.linear": mxfp8,
        "mxfp4.matmul": said(mx_variant.variant, E2M1, E2M1),
        "mxfp4.linear": said(mx_variant.variant, E4M3, E2M1),
    }


@cache
def _choose_gpu(device: torch.device) -> Choice:
    target = target_of(device)
    if target is None:
        return Choice(Implementation.TORCH, "this GPU is older than sm_80, or unknown")
    return _choose_target(target)


def _choose_target(target: Target) -> Choice:
    if importlib.util.find_spec("triton") is None:
        return Choice(Implementation.TORCH, "triton is not installed; pip install 'autoq[triton]'")
    return Choice(Implementation.TRITON, f"kernels for {target.name}")
