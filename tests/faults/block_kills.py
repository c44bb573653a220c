"""Kills the process when so many blocks are calibrated; `fork_server` calls `install`."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from typing import Any

BLOCKS = "AUTOQ_KILL_AFTER_BLOCKS"


def after(blocks: int) -> dict[str, Any]:
    """What makes a command end by SIGKILL when it has stored the calibration of so many blocks."""
    return {"setup": f"{__name__}:install", "environment": {BLOCKS: str(blocks)}}


def install(environment: Mapping[str, str]) -> None:
    """Count blocks."""
    from autoq.api._calibration_parts import CalibrationParts

    add, left = CalibrationParts.add, int(environment[BLOCKS])

    def add_and_count(parts: CalibrationParts, *arguments: Any) -> None:
        nonlocal left
        add(parts, *arguments)
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    CalibrationParts.add = add_and_count  # type: ignore[method-assign]
