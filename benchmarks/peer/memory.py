"""Resident memory of the running process, for both tools alike."""

from __future__ import annotations

from pathlib import Path


def peak_rss_bytes() -> int:
    """High-water mark of this process's resident memory.

    getrusage is not used: on Linux its maximum includes the process that started this one.
    """
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM in /proc/self/status; this benchmark needs Linux")
