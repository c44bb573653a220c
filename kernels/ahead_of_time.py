"""Compiling kernels for GPUs that are not there, by launching them on meta tensors.

A stand-in driver lets the real launch wrappers run: triton specialises and compiles as it would at
run time, and nothing is started. Not to be mixed with real launches in one process.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoq.kernels.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True)
class CompiledKernel:
    """What the compiler made of one kernel for one target."""

    name: str
    target: Target
    registers: int  # per thread
    spill_bytes: int  # per thread: stack and local memory
    shared_memory_bytes: int  # per program
    assembly: str  # PTX or AMD GCN
    binary: bytes  # what the GPU runs


def compile_launches(target: Target, launch: Callable[[], object]) -> list[CompiledKernel]:
    """Run `launch`, whose tensors are on the meta device, and return the kernels it compiled.

    Raises:
        triton's errors, where a kernel does not compile or exceeds the target's resources.
    """
    with _compiling_for(target) as compiled:
        launch()
    return [_described(kernel, target) for kernel in compiled]


def launched_kernels(target: Target, launch: Callable[[], object]) -> list[str]:
    """Modules and names of the kernels that `launch` starts; compiles nothing."""
    from triton.runtime import JITFunction

    names: list[str] = []

    def record(kernel: Any, *_: Any, **__: Any) -> None:
        names.append(f"{kernel.__module__}.{kernel.__name__}")

    run = JITFunction.run
    JITFunction.run = record
    try:
        with _compiling_for(target):
            launch()
    finally:
        JITFunction.run = run
    return names


def disassembled(binary: bytes) -> str:
    """The machine code of an NVIDIA kernel, as nvdisasm, which comes with triton, prints it."""
    import triton

    return _asked_of_binary([triton.knobs.nvidia.nvdisasm.path, "-c"], binary)


class _StandInDriver:
    """As much of a triton driver as compiling needs."""

    # The in-memory kernel cache is per device: a fresh number makes every run compile.
    _numbers = itertools.count(1000)

    def __init__(self, target: Target) -> None:
        self._target = target
        self._device = next(self._numbers)
        self.utils = self

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        target = self._target
        return GPUTarget(target.backend, target.architecture, target.threads_per_warp)

    def get_current_device(self) -> int:
        return self._device

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_benchmarker(self) -> Callable[..., list[float]]:
        def run_once(
            function: Callable[[], object], quantiles: Any = None, **_: Any
        ) -> list[float]:
            function()
            return [1.0, 1.0, 1.0]

        return run_once

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": self._target.shared_memory_bytes, "multiprocessor_count": 132}

    def load_binary(self, *_: Any) -> tuple[object, object, int, int, int]:
        return object(), object(), 0, 0, 1024

    def unload_module(self, module: object) -> None:
        pass


@contextmanager
def _compiling_for(target: Target) -> Iterator[list[Any]]:
    import triton
    from triton.compiler import CompiledKernel as TritonKernel
    from triton.runtime.driver import driver

    if triton.knobs.runtime.interpret:
        raise RuntimeError("the interpreter is on: unset TRITON_INTERPRET to compile")
    compiled: list[Any] = []
    load = TritonKernel._init_handles

    def record(kernel: Any) -> None:
        if kernel not in compiled:
            compiled.append(kernel)
        load(kernel)

    previous = driver._active  # None until the first launch, which then looks for a GPU
    driver.set_active(_StandInDriver(target))
    TritonKernel._init_handles = record
    try:
        yield compiled
    finally:
        TritonKernel._init_handles = load
        driver.set_active(previous)


def _described(kernel: Any, target: Target) -> CompiledKernel:
    if target.backend == "hip":
        assembly = kernel.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", assembly)[1])  # type: ignore[index]
        spills = int(re.search(r"\.private_segment_fixed_size:\s*(\d+)", assembly)[1])  # type: ignore[index]
    else:
        assembly = kernel.asm["ptx"]
        registers, spills = _cuda_resources(kernel.asm["cubin"])
    return CompiledKernel(
        name=kernel.metadata.name,
        target=target,
        registers=registers,
        spill_bytes=spills,
        shared_memory_bytes=kernel.metadata.shared,
        assembly=assembly,
        binary=kernel.asm["hsaco" if target.backend == "hip" else "cubin"],
    )


def _cuda_resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) as cuobjdump, which comes with triton, reads them."""
    import triton

    output = _asked_of_binary([triton.knobs.nvidia.cuobjdump.path, "-res-usage"], cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+).*LOCAL:(\d+)", output)
    assert found is not None, output
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def performance_warnings(kernel: CompiledKernel) -> list[str]:
    """What NVIDIA's assembler warns of, above all that asynchronous products wait for each other.

    Asked only of kernels for sm_90's asynchronous matrix units, because it assembles again.
    """
    if kernel.target.architecture != 90 or "wgmma" not in kernel.assembly:
        return []
    return assembler_warnings(kernel.assembly)


def assembler_warnings(ptx: str) -> list[str]:
    """The warnings of performance lost that the assembler has about PTX for sm_90."""
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx, encoding="utf-8")
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", str(path), "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return re.findall(r"Potential Performance Loss: (.*)", done.stderr)


def _asked_of_binary(command: list[str], cubin: bytes) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=True)
    return done.stdout
