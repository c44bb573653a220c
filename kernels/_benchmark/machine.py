"""What is measured on: hardware and versions, no names of hosts, users or folders."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import torch

_CPU_INFO = Path("/proc/cpuinfo")
_SECONDS_FOR_DRIVER = 10


def machine(device: torch.device) -> dict[str, str | int | None]:
    """Device, hardware, driver, versions and the date (UTC)."""
    on_gpu = device.type == "cuda"
    return {
        "device": device.type,
        "hardware": torch.cuda.get_device_name(device) if on_gpu else cpu_name(),
        "driver": _driver() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "autoq": _version("autoq"),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "hip": torch.version.hip,
        "python": platform.python_version(),
        "system": platform.system(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def cpu_name() -> str:
    """The CPU's model and the widest vectors that torch uses on it."""
    return f"{_cpu_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _cpu_model() -> str:
    try:
        lines = _CPU_INFO.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return next(iter(names), platform.processor() or platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    """The NVIDIA driver; None where its tool does not say."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    query = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        result = subprocess.run(
            query, check=True, capture_output=True, text=True, timeout=_SECONDS_FOR_DRIVER
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(result.stdout.split()), None)
