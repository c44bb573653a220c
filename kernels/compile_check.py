"""Whether every launch compiles for a target as it must: what the tests and the program ask."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels.ahead_of_time import (
    CompiledKernel,
    compile_launches,
    disassembled,
    performance_warnings,
)
from autoq.kernels.targets import Target

_INSTRUCTIONS = {
    r"wgmma\.mma_async\.sync\.aligned\.m\d+n\d+k\d+\.\w+\.(\w+)\.": "wgmma {}",
    r"tcgen05\.mma\.cta_group::\d\.kind::(\w+)": "tcgen05 {}",
    r"mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col\.kind::(\w+)": "mma.sync {}",
    r"mma\.sync\.aligned\.m\d+n\d+k\d+\.row\.col\.(?:satfinite\.)?\w+\.(\w+)\.": "mma.sync {}",
    r"v_mfma_(?:scale_)?[fi]32_(\d+x\d+x\d+_?\w+)": "mfma {}",
    r"cvt\.rn\.satfinite\.(?:relu\.)?(e\dm\dx2)": "cvt {}",
    r"v_cvt_(?:scalef32_)?(?:pk_)?(fp8|fp4|bf8)_": "cvt {}",
}
"""Expressions for matrix and conversion units in PTX and AMD GCN, and how they are called here."""

_APPROXIMATIONS = re.compile(r"\b(?:div\.full|(?:div|rcp|sqrt|rsqrt|ex2|lg2)\.approx)\b")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFigures:
    """What one kernel of a launch takes, and the matrix and conversion units that it uses."""

    name: str
    registers: int  # per thread
    spill_bytes: int  # per thread
    shared_memory_bytes: int  # per program
    instructions: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckedLaunch:
    """One launch compiled for one target."""

    operation: str
    variant: str
    target: str
    kernels: tuple[KernelFigures, ...]
    failures: tuple[str, ...]  # why it is not as it must be; empty where it is
    seconds: float

    @property
    def name(self) -> str:
        """Operation and variant, as of the case."""
        return f"{self.operation} ({self.variant})"


def check(case: CompileCase, target: Target) -> CheckedLaunch:
    """Compile the case for the target and hold the result to what the case and target demand."""
    started = time.monotonic()
    compiled: list[CompiledKernel] = []
    try:
        compiled = compile_launches(target, lambda: case.launch(target))
        failures = _failures(case, target, compiled)
    except Exception as error:  # noqa: BLE001  (whatever the compiler raises is a finding)
        failures = [f"{type(error).__name__}: {_first_line(error)}"]
    return CheckedLaunch(
        operation=case.operation,
        variant=case.variant,
        target=target.name,
        kernels=tuple(_figures(kernel) for kernel in compiled),
        failures=tuple(failures),
        seconds=time.monotonic() - started,
    )


def unchecked(case: CompileCase, target: str, reason: str) -> CheckedLaunch:
    """The result where no compiler came back with one."""
    return CheckedLaunch(
        operation=case.operation,
        variant=case.variant,
        target=target,
        kernels=(),
        failures=(reason,),
        seconds=0.0,
    )


def contractions(case: CompileCase, target: Target) -> list[str]:
    """Kernels of the case where the compiler fused a product with a sum by its own choice.

    Such a sum is rounded once, not twice as the torch bodies round it. Found by compiling with
    fusion forbidden too. NVIDIA targets only.
    """
    counts = []
    for allowed in ("1", "0"):
        with _environment("TRITON_DEFAULT_FP_FUSION", allowed):
            compiled = compile_launches(target, lambda: case.launch(target))
        counts.append(
            [(kernel.name, fused_operations(disassembled(kernel.binary))) for kernel in compiled]
        )
    return [
        f"{name}: {fused} fused operations, {written} are written"
        for (name, fused), (_, written) in zip(*counts, strict=True)
        if fused != written
    ]


def fused_operations(assembly: str) -> int:
    """How many products and sums in one operation NVIDIA assembly has.

    A constant may be loaded as zero times zero plus the constant, on units that are idle; where
    that is done changes with everything else, and it computes nothing.
    """
    return len(re.findall(r"\b[DFH]FMA2?\b(?!\S*\s+\w+, -?RZ, -?RZ,)", assembly))


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    previous = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name)
        if previous is not None:
            os.environ[name] = previous


def instructions(assembly: str) -> tuple[str, ...]:
    """The matrix and conversion units that PTX or AMD GCN uses, matrix units first."""
    found = {
        label.format(match): None
        for expression, label in _INSTRUCTIONS.items()
        for match in sorted(set(re.findall(expression, assembly)))
    }
    return tuple(found)


def _figures(kernel: CompiledKernel) -> KernelFigures:
    return KernelFigures(
        name=kernel.name,
        registers=kernel.registers,
        spill_bytes=kernel.spill_bytes,
        shared_memory_bytes=kernel.shared_memory_bytes,
        instructions=instructions(kernel.assembly),
    )


def _failures(case: CompileCase, target: Target, compiled: list[CompiledKernel]) -> list[str]:
    if not compiled:
        return ["nothing was launched"]
    failures = []
    expected = case.instructions.get(target.name)
    if expected and not any(re.search(expected, kernel.assembly) for kernel in compiled):
        failures.append(f"no instruction matches {expected}")
    for kernel in compiled:
        failures += _kernel_failures(case, target, kernel)
    return failures


def _kernel_failures(case: CompileCase, target: Target, kernel: CompiledKernel) -> list[str]:
    failures = []
    allowed = case.allowed_spill_bytes.get((target.name, triton_version()), 0)
    if kernel.spill_bytes > allowed:
        failures.append(f"{kernel.name} spills {kernel.spill_bytes} bytes, {allowed} are allowed")
    if kernel.shared_memory_bytes > target.shared_memory_bytes:
        failures.append(
            f"{kernel.name} takes {kernel.shared_memory_bytes} bytes of shared memory, "
            f"{target.name} has {target.shared_memory_bytes}"
        )
    approximation = _APPROXIMATIONS.search(kernel.assembly)
    if approximation:
        failures.append(f"{kernel.name} computes approximately: {approximation[0]}")
    failures += [f"{kernel.name}: {warning}" for warning in performance_warnings(kernel)]
    return failures


def triton_version() -> str:
    """Major and minor version of the triton at hand, "3.9"."""
    import triton

    return ".".join(triton.__version__.split(".")[:2])


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
