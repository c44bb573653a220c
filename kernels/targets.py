"""The GPU generations that kernels are compiled for, and what each can do."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from autoq.registry import Registry


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One GPU generation, as far as kernels care."""

    name: str
    backend: str  # "cuda" or "hip", as triton calls them
    architecture: int | str  # 90 for compute capability 9.0; "gfx942"
    threads_per_warp: int
    shared_memory_bytes: int  # that one program may take
    fp8_type: bool  # triton has its float8e4nv here: the OCP E4M3 of every checkpoint
    fp8_matmul: bool  # matrix units take E4M3
    nvfp4_matmul: bool  # matrix units take E2M1 with an E4M3 scale per 16
    mx_matmul: bool  # matrix units take MXFP4 and MXFP8
    bulk_copy: bool  # tensor descriptors move tiles asynchronously


def _cuda(capability: int, shared_memory_bytes: int) -> Target:
    return Target(
        name=f"sm_{capability}",
        backend="cuda",
        architecture=capability,
        threads_per_warp=32,
        shared_memory_bytes=shared_memory_bytes,
        fp8_type=capability >= 89,
        fp8_matmul=capability >= 89,
        nvfp4_matmul=capability >= 100,
        mx_matmul=capability >= 100,
        bulk_copy=capability >= 90,
    )


def _hip(architecture: str, shared_memory_bytes: int, *, ocp_fp8: bool) -> Target:
    return Target(
        name=architecture,
        backend="hip",
        architecture=architecture,
        threads_per_warp=64,
        shared_memory_bytes=shared_memory_bytes,
        fp8_type=ocp_fp8,
        fp8_matmul=ocp_fp8,
        nvfp4_matmul=False,
        mx_matmul=ocp_fp8,
        bulk_copy=False,
    )


# Shared memory: CUDA C++ programming guide, table of technical specifications; AMD CDNA 3 and 4
# instruction set architecture guides. gfx942 multiplies the FNUZ variant of E4M3, not OCP's.
TARGETS: Registry[Target] = Registry("target")
"""What `autoq kernels check` compiles for, by name."""

for _target in (
    _cuda(80, 166_912),
    _cuda(89, 101_376),
    _cuda(90, 232_448),
    _cuda(100, 232_448),
    _cuda(120, 101_376),
    _hip("gfx942", 65_536, ocp_fp8=False),
    _hip("gfx950", 163_840, ocp_fp8=True),
):
    TARGETS.register(_target.name, _target)

_SMALLER_RELATIVES = {
    86: (80, 101_376),
    87: (80, 166_912),
    103: (100, 232_448),
    121: (120, 101_376),
}
"""Capability -> the target it behaves like, and its own shared memory."""


def target_of(device: torch.device) -> Target | None:
    """The target that `device` is, or None where triton kernels do not run on it."""
    if device.type != "cuda":
        return None
    if torch.version.hip is not None:
        architecture = torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
        return TARGETS.get(architecture)
    major, minor = torch.cuda.get_device_capability(device)
    return target_of_capability(10 * major + minor)


def target_of_capability(capability: int) -> Target | None:
    """The target of an NVIDIA compute capability, 90 for 9.0; None if it is too old or unknown."""
    like, shared_memory_bytes = _SMALLER_RELATIVES.get(capability, (capability, None))
    target = TARGETS.get(f"sm_{like}")
    if target is None or shared_memory_bytes is None:
        return target
    return replace(
        target,
        name=f"sm_{capability}",
        architecture=capability,
        shared_memory_bytes=shared_memory_bytes,
    )
