"""Processes that end when the process that started them does, however that ended."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

_SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h
_POLL_SECONDS = 0.25


def end_with(parent: int) -> None:
    """Kill this process as soon as its parent is gone.

    By the kernel where that is Linux, at once; by a thread that looks elsewhere.

    Args:
        parent: the process that started this one.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0) == 0:
            if os.getppid() != parent:  # it ended before the call
                os._exit(1)
            return
    threading.Thread(target=_end_when_alone, args=(parent,), daemon=True).start()


def _end_when_alone(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)
