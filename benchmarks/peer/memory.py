"""Resident memory of the running process, measured for both tools alike."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path


def leave_triton_out() -> None:
    """Let no import of this process find Triton; call before torch is imported.

    transformers' models import torch's compiler, which loads Triton wherever that is installed:
    70 MB of a library that does nothing on CPUs. It comes with CUDA builds of torch and with
    development tools, so whether a CPU's environment has it says nothing of the tool inside.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch was imported before Triton was left out")
    sys.modules["triton"] = None  # type: ignore[assignment]  # how Python marks what is not to be found


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident memory.

    getrusage is not used: on Linux its maximum includes the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark needs Linux")


def import_ahead(model: str, *modules: str) -> None:
    """Import what a search would import on its way, so that memory before and after compares.

    Args:
        model: folder whose architecture's code transformers puts off till loading.
        modules: what the tool itself puts off.
    """
    import transformers

    config = transformers.AutoConfig.from_pretrained(model)
    transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    for module in modules:
        importlib.import_module(module)
