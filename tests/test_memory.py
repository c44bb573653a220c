"""Memory: its peak wherever the system says it, what is left of every limit, and giving it back."""

from __future__ import annotations

import ctypes
import os
import resource
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from autoq import memory


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


CPU = torch.device("cpu")
MIB = 1 << 20


def control_group(folder: Path, limit: str, used: int, file_cache: int = 0) -> None:
    """The files of a control group of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    statistics = f"anon {used - file_cache}\ninactive_file {file_cache}\nactive_file 0\n"
    (folder / "memory.stat").write_text(statistics)


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place for control groups; the process is in jobs/own, and the machine has 100 MiB left."""
    membership = tmp_path / "cgroup"
    membership.write_text("4:memory:/elsewhere\n0::/jobs/own\n")
    monkeypatch.setattr(memory, "OWN_CONTROL_GROUPS", membership)
    monkeypatch.setattr(memory, "CONTROL_GROUPS", tmp_path / "groups")
    machine = type("Memory", (), {"available": 100 * MIB})
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machine)
    return tmp_path / "groups"


def test_without_a_limit_the_machines_memory_is_available(groups: Path) -> None:
    assert memory.available_bytes(CPU) == 100 * MIB
    control_group(groups / "jobs" / "own", "max", 70 * MIB)
    assert memory.available_bytes(CPU) == 100 * MIB


def test_what_a_container_has_left_is_available(groups: Path) -> None:
    control_group(groups / "jobs" / "own", str(64 * MIB), used=50 * MIB, file_cache=20 * MIB)
    assert memory.available_bytes(CPU) == 34 * MIB


def test_the_narrowest_limit_counts(groups: Path) -> None:
    control_group(groups / "jobs" / "own", str(64 * MIB), used=4 * MIB)
    control_group(groups / "jobs", str(80 * MIB), used=50 * MIB)
    control_group(groups, "max", 0)
    assert memory.available_bytes(CPU) == 30 * MIB
    control_group(groups / "jobs", str(80 * MIB), used=90 * MIB)
    assert memory.available_bytes(CPU) == 0


def test_a_machine_without_control_groups_has_no_limit(
    groups: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "OWN_CONTROL_GROUPS", groups / "missing")
    assert memory.available_bytes(CPU) == 100 * MIB


def test_on_a_gpu_what_torch_keeps_unused_is_available(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10 * MIB, 80 * MIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 30 * MIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 25 * MIB)
    assert memory.available_bytes(torch.device("cuda", 0)) == 15 * MIB


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library has no malloc_trim"
)
def test_freed_memory_goes_back() -> None:
    """Every second of many pieces is freed, so that the C library keeps the gaps by itself."""
    pieces = [torch.zeros(16 << 10) for _ in range(2048)]  # 64 KiB each: not mapped by themselves
    del pieces[::2]
    before = psutil.Process().memory_info().rss
    memory.give_back_freed_memory()
    freed = before - psutil.Process().memory_info().rss
    del pieces
    assert freed > 32 * MIB  # of 64


def test_a_c_library_without_the_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    memory.give_back_freed_memory()


_COUNT_MAPPED_BLOCKS = """
import ctypes
from autoq.memory import large_blocks_given_back_at_once

class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]

library = ctypes.CDLL(None)
library.mallinfo2.restype = Info
library.malloc.restype = ctypes.c_void_p
library.malloc.argtypes = [ctypes.c_size_t]

def is_mapped(mebibytes):
    before = library.mallinfo2().hblks
    assert library.malloc(mebibytes << 20)
    return library.mallinfo2().hblks > before

with large_blocks_given_back_at_once():
    inside = is_mapped(3), is_mapped(5)
print(*inside, is_mapped(5), is_mapped(31), is_mapped(33))
"""


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="the C library has no mallinfo2"
)
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, "False True False False True"),
        # The user's 64 MiB stay, before and behind.
        ({"MALLOC_MMAP_THRESHOLD_": str(64 * MIB)}, "False False False False False"),
    ],
)
def test_large_blocks_are_mapped_by_themselves_only_meanwhile(
    chosen: dict[str, str], expected: str
) -> None:
    """In a process of its own, since the setting is one of the whole process."""
    environment = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"} | chosen
    command = [sys.executable, "-c", _COUNT_MAPPED_BLOCKS]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == expected
