"""The same kernel tests in three modes, chosen before triton is imported.

KERNEL_MODE=interpret runs them in triton's interpreter on the CPU, KERNEL_MODE=compile compiles for
every target and launches nothing, KERNEL_MODE=gpu (the default where there is a GPU) runs them on
it. Without a mode, nothing is collected here: `tests/kernels/test_triton.py` starts the modes as
child processes, with every triton that is supported, and names it in KERNEL_TRITON.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

MODE = os.environ.get("KERNEL_MODE") or ("gpu" if torch.cuda.is_available() else None)

sys.path.insert(0, os.path.dirname(__file__))

if MODE == "interpret":
    assert "triton" not in sys.modules, "TRITON_INTERPRET must be set before triton is imported"
    os.environ["TRITON_INTERPRET"] = "1"
    # Only the test of the gate asks for the interpreter as it comes.
    if os.environ.get("KERNEL_REPAIRS") != "off":
        import interpreter

        interpreter.install()

if "KERNEL_TRITON" in os.environ:
    import triton

    assert triton.__version__ == os.environ["KERNEL_TRITON"], triton.__file__

from red_zone import RedZones, for_launches


def pytest_ignore_collect(collection_path):
    """Leave `test_compile.py` out where kernels run, and all else where they are only compiled."""
    if not collection_path.name.startswith("test_"):
        return None
    compiles = collection_path.name == "test_compile.py"
    return MODE is None or compiles != (MODE == "compile") or None


def pytest_collection_modifyitems(items):
    for item in items:
        if MODE == "gpu" and item.path.parent == Path(__file__).parent:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where numeric tests keep their tensors."""
    return torch.device("cuda" if MODE == "gpu" else "cpu")


@pytest.fixture(autouse=True)
def needed_abilities(request, device):
    """Skip what the GPU at hand has no instruction for."""
    from autoq.kernels.targets import target_of

    target = target_of(device)
    for marker in request.node.iter_markers("needs"):
        if target is not None and not getattr(target, marker.args[0]):
            pytest.skip(f"{target.name} has no {marker.args[0]}")


@pytest.fixture
def guard(device):
    """`guard(shape, dtype)` and `guard.copy(tensor)` give tensors between red zones.

    At the end of the test the zones must be as they were.
    """
    zones = RedZones(device)
    yield zones
    zones.check()


@pytest.fixture(autouse=True)
def guarded_outputs(monkeypatch, device):
    """Everything that launch wrappers allocate lies between red zones, in every test here."""
    if MODE == "compile":
        yield
        return
    zones = RedZones(device)
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, for_launches(zones, getattr(torch, name)))
    yield
    zones.check()
