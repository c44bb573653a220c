"""How much memory this process has had."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")
"""Some kernels and sandboxes write it without peaks, or not at all."""


def peak_rss_bytes() -> int:
    """The largest resident memory that this process has had."""
    # On Linux getrusage also counts the process that started this one.
    peak = _peak_in_status(STATUS)
    if peak is not None:
        return peak
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest if sys.platform == "darwin" else largest * 1024


def _peak_in_status(status: Path) -> int | None:
    """The peak that Linux writes there, in bytes; None where it is not written."""
    if not status.is_file():
        return None
    for line in status.read_text(encoding="ascii", errors="replace").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return None
