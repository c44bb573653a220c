"""The benchmark against the peer computes what its tables say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from autoq.kernels import nvfp4

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def load_script(path: Path) -> ModuleType:
    """A benchmark's module; the folder is not a package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_nvfp4_for_the_peer_rounds_like_autoq() -> None:
    shim = load_script(BENCHMARKS / "peer" / "modelopt_cpu_shim.py")
    values = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    amax = values.abs().max()
    ours = nvfp4.fake_quantize(values, nvfp4.global_scale(amax))
    torch.testing.assert_close(
        shim.nvfp4_quantize_dequantize(values, amax, 16), ours, rtol=1e-6, atol=0
    )


def run_of(seconds: float, rss_bytes: float) -> dict[str, Any]:
    """What one search reports."""
    return {
        "stage_seconds": {"calibration": seconds, "scoring": 2 * seconds, "solving": 0.5},
        "search_seconds": 4 * seconds,
        "search_cpu_seconds": 3 * seconds,
        "process_seconds": 8 * seconds,
        "imports_rss_bytes": 100e6,
        "peak_rss_bytes": rss_bytes,
    }


@pytest.fixture(scope="module")
def compare_peer() -> ModuleType:
    """The benchmark's main script."""
    return load_script(BENCHMARKS / "compare_peer.py")


def test_cost_table_holds_medians_and_their_ratio(compare_peer: ModuleType) -> None:
    peer = [run_of(seconds, 500e6) for seconds in (9.0, 2.0, 1.0)]
    own = [run_of(seconds, 300e6) for seconds in (1.0, 0.5, 7.0)]
    table = compare_peer._cost_table(peer, own)
    assert "| calibration, s | 2.00 | 1.00 | 0.50 |" in table
    assert "| calibration + scoring + solving, s | 6.50 | 3.50 | 0.54 |" in table
    assert "| peak resident memory, MB | 500.00 | 300.00 | 0.60 |" in table
    assert "| the same above the imports, MB | 400.00 | 200.00 | 0.50 |" in table


def test_loss_table_holds_both_assignments_and_their_ratio(compare_peer: ModuleType) -> None:
    def measured(divergence: float) -> dict[str, Any]:
        interval = [divergence / 2, divergence * 2]
        return {"effective_bits": 4.75, "kl_divergence": divergence, "kl_interval": interval}

    row = {
        "label": "as_shipped",
        "budget_bits": 4.8,
        "peer": measured(2e-3),
        "autoq": measured(1e-3),
    }
    table = compare_peer._loss_table([row])
    assert (
        "| as shipped | 4.8 | 4.7500 | 4.7500 | 2.000e-03 (1.00e-03 to 4.00e-03) "
        "| 1.000e-03 (5.00e-04 to 2.00e-03) | 0.500 |"
    ) in table
