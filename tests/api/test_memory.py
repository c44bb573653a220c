"""The peak of resident memory, wherever the system says it."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from autoq.api import memory


def test_the_peak_is_read_from_the_process_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tautoq\nVmPeak:\t 900 kB\nVmHWM:\t 123 kB\n")
    monkeypatch.setattr(memory, "STATUS", status)
    assert memory.peak_rss_bytes() == 123 * 1024


def test_a_status_without_the_peak_falls_back_on_the_resource_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    status = tmp_path / "status"
    status.write_text("Name:\tautoq\nVmPeak:\t 900 kB\n")
    own_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for place in (status, tmp_path / "missing"):
        monkeypatch.setattr(memory, "STATUS", place)
        monkeypatch.setattr(memory.sys, "platform", "linux")
        # It may have grown since; half as much again is not what a wrong unit makes of it.
        assert own_kilobytes * 1024 <= memory.peak_rss_bytes() < own_kilobytes * 1536
