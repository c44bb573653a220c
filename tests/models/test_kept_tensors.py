"""What blocks gave waits in memory or in files, and comes back as it was."""

from __future__ import annotations

import errno
import resource
import signal
from pathlib import Path

import pytest
import torch

from autoq.models.kept_tensors import KeptTensors


@pytest.mark.parametrize("memory", [0, 24, 1 << 20], ids=["files", "both", "memory"])
def test_outputs_come_back_and_leave_nothing(memory: int, tmp_path: Path) -> None:
    kept = KeptTensors(tmp_path, memory)
    first = torch.arange(6, dtype=torch.float32).reshape(2, 3)
    second = torch.arange(4).to(torch.bfloat16).reshape(2, 2).t()
    kept.put((0, 1), (first, [second, None], "word", torch.zeros(0, 3)))

    assert (
        len(list(tmp_path.iterdir())) == {0: 2, 24: 1, 1 << 20: 0}[memory]
    )  # nothing takes no room
    for read in (kept.get, kept.get, kept.take):
        found = read((0, 1))
        assert torch.equal(found[0], first) and found[0].dtype == torch.float32
        assert torch.equal(found[1][0], second) and found[1][0].dtype == torch.bfloat16
        assert (found[1][1], found[2], found[3].shape) == (None, "word", (0, 3))
        found[0].zero_()  # models write to what they are given
    assert (0, 1) not in kept
    assert list(tmp_path.iterdir()) == []


def test_memory_that_is_free_again_is_used_again(tmp_path: Path) -> None:
    kept = KeptTensors(tmp_path, 8)
    for number in range(3):
        kept.put((number, 0), torch.zeros(2))
        kept.remove(number)
        assert list(tmp_path.iterdir()) == []
    kept.put((3, 0), torch.zeros(2))
    kept.put((4, 0), torch.zeros(2))
    assert len(list(tmp_path.iterdir())) == 1
    kept.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_file_and_the_reason(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        with pytest.raises(OSError) as caught:
            KeptTensors(tmp_path).put((2, 5), torch.zeros(1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.strerror == "File too large"
    assert caught.value.filename == str(tmp_path / "block-2-input-5.")
