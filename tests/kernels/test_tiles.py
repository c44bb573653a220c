"""Which autotuner a launch takes; what it measures needs a GPU."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from autoq.kernels._launch import tiles
from autoq.kernels._launch.tiles import Tile, tuned

TILES = (Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3))


def _operand(index: int = 0) -> SimpleNamespace:
    return SimpleNamespace(is_cuda=True, device=torch.device("cuda", index))


@pytest.fixture
def capturing(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    state = {"now": False}
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state["now"])
    monkeypatch.setattr(tiles.triton, "autotune", lambda configs, **_: lambda kernel: object())
    tiles._autotuned.cache_clear()
    return state


def test_one_autotuner_serves_launches_that_are_alike(capturing: dict[str, bool]) -> None:
    first, _ = tuned("kernel", TILES, _operand(), apart=torch.bfloat16)
    second, _ = tuned("kernel", TILES, _operand(), apart=torch.bfloat16)
    assert first is second


@pytest.mark.parametrize(
    "other",
    [
        lambda: tuned("kernel", TILES, _operand(), apart=torch.float32),
        lambda: tuned("kernel", TILES, _operand(1), apart=torch.bfloat16),
        lambda: tuned("kernel", TILES[:1], _operand(), apart=torch.bfloat16),
    ],
    ids=["dtype", "device", "tiles"],
)
def test_what_fits_other_tiles_is_measured_apart(capturing: dict[str, bool], other) -> None:
    first, _ = tuned("kernel", TILES, _operand(), apart=torch.bfloat16)
    assert other()[0] is not first


def test_threads_do_not_share_an_autotuner(capturing: dict[str, bool]) -> None:
    found = [tuned("kernel", TILES, _operand())[0]]
    thread = threading.Thread(target=lambda: found.append(tuned("kernel", TILES, _operand())[0]))
    thread.start()
    thread.join()
    assert found[0] is not found[1]


def test_nothing_is_measured_while_a_graph_is_captured(capturing: dict[str, bool]) -> None:
    capturing["now"] = True
    kernel, options = tuned("kernel", TILES, _operand())
    assert kernel == "kernel"
    assert options["BLOCK_N"] == 64
