"""The same kernel tests in three modes, chosen before triton is imported.

KERNEL_MODE=interpret runs them in triton's interpreter on the CPU, KERNEL_MODE=compile compiles for
every target and launches nothing, KERNEL_MODE=gpu (the default where there is a GPU) runs them on
it. Without a mode, nothing is collected here: `tests/kernels/test_triton.py` starts the modes as
child processes, with every triton that is installed.
"""

from __future__ import annotations

import os
import sys

import pytest
import torch

MODE = os.environ.get("KERNEL_MODE") or ("gpu" if torch.cuda.is_available() else None)

if MODE == "interpret":
    assert "triton" not in sys.modules, "TRITON_INTERPRET must be set before triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.insert(0, os.path.dirname(__file__))
    import interpreter

    interpreter.install()

collect_ignore_glob = [] if MODE else ["test_*.py"]


def pytest_collection_modifyitems(config, items):
    for item in items:
        compiles = item.get_closest_marker("compiled") is not None
        if MODE == "gpu" and not compiles:
            item.add_marker(pytest.mark.gpu)
        if compiles != (MODE == "compile"):
            item.add_marker(pytest.mark.skip(reason=f"not for KERNEL_MODE={MODE}"))


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where numeric tests keep their tensors."""
    return torch.device("cuda" if MODE == "gpu" else "cpu")
