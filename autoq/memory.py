"""How much memory this process has had, what it may still take, and how it gives some back."""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import torch

STATUS = Path("/proc/self/status")
"""Some kernels and sandboxes write it without peaks, or not at all."""

OWN_CONTROL_GROUPS = Path("/proc/self/cgroup")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
"""Where Linux (version 2 of control groups) says how much memory a container or a job may have."""


_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of malloc.h
_TRIM_THRESHOLD = -1  # M_TRIM_THRESHOLD
_LARGE_BYTES = 4 << 20
_KEPT_BYTES = 16 << 20
"""Of freed small blocks: by default 128 KiB, and each scratch tensor is cleared by the system again."""
_LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20
"""As far as glibc raises it by itself; its limit for trimming is then twice that."""


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    # On Linux getrusage also counts the process that started this one.
    peak = _peak_in_status(STATUS)
    if peak is not None:
        return peak
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def available_bytes(device: torch.device) -> int:
    """What this process can still take on a device without anything being swapped or killed.

    On a GPU that is what nobody has, and what torch has and does not use. On a CPU it is what the
    machine has left, or the container or job that the process runs in, whichever is less.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(free) + cached
    return min([int(psutil.virtual_memory().available), *_left_in_control_groups()])


def give_back_freed_memory() -> None:
    """Have the C library return to the system what was freed; call when a stage is over.

    glibc keeps freed memory below what is still used, tens of megabytes after calibration, and what
    comes next does not fit into the gaps. It costs milliseconds, and does nothing where the C
    library has no such function.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextmanager
def large_blocks_given_back_at_once() -> Iterator[None]:
    """Have the C library map every block of 4 MiB or more by itself, so that freeing gives it back.

    Left alone glibc raises that limit to 32 MiB once larger blocks come and go, and puts what is
    below among small blocks, between which holes remain. It holds for all threads of the process,
    and costs the clearing of fresh memory; so behind it the limits are those that glibc would have
    come to by itself. Nothing happens where the C library has no such setting, or where the user
    has set the limit.
    """
    set_option = None
    if sys.platform == "linux" and not _mmap_threshold_is_set():
        set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        yield
        return
    set_option(_MMAP_THRESHOLD, _LARGE_BYTES)
    set_option(_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        set_option(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES)
        set_option(_TRIM_THRESHOLD, 2 * _LARGEST_MMAP_THRESHOLD_BYTES)


def _mmap_threshold_is_set() -> bool:
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "MALLOC_MMAP_THRESHOLD_" in os.environ or "malloc.mmap_threshold" in tunables


def _peak_in_status(status: Path) -> int | None:
    """The peak that Linux writes there, in bytes; None where it is not written."""
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None


def _left_in_control_groups() -> Iterator[int]:
    """What is left of each memory limit on this process, in bytes."""
    for folder in _control_groups():
        try:
            limit = (folder / "memory.max").read_text()
            used = int((folder / "memory.current").read_text())
            statistics = (folder / "memory.stat").read_text()
        except (OSError, ValueError):
            continue  # the group has no memory controller
        if limit.strip() != "max":
            yield max(int(limit) - used + _file_cache_bytes(statistics), 0)


def _control_groups() -> Iterator[Path]:
    """The process's control group and those that it is in, as far as they are visible."""
    try:
        lines = OWN_CONTROL_GROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        number, _, path = line.split(":", 2)
        if number == "0":  # version 2
            own = CONTROL_GROUPS / path.lstrip("/")
            yield own
            yield from (parent for parent in own.parents if parent.is_relative_to(CONTROL_GROUPS))


def _file_cache_bytes(statistics: str) -> int:
    """What the kernel drops first when memory is short."""
    fields = dict(line.split() for line in statistics.splitlines())
    return int(fields.get("inactive_file", 0))
