"""HiGHS through scipy, for 0-1 programs, with nothing leaking to standard output."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INFEASIBLE = 2  # among scipy's status codes

# File descriptor 1 belongs to the whole process: two threads that redirect it at once could leave
# it redirected for good.
_stdout_lock = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class HighsAnswer:
    """What HiGHS knows when it stops."""

    values: NDArray[np.float64] | None  # None when it found nothing in time
    bound: float  # no solution has a lower objective; -inf when it proved nothing
    infeasible: bool = False  # it proved that there is no solution


def minimise(
    objective: NDArray[np.float64],
    rows: Any,
    row_bounds: tuple[NDArray[np.float64], NDArray[np.float64]],
    *,
    integers: NDArray[np.bool_],
    upper: NDArray[np.float64],
    time_limit_seconds: float,
    relative_gap: float = 0.0,
    node_limit: int | None = None,
) -> HighsAnswer:
    """Minimise `objective @ x` with `low <= rows @ x <= high` and `0 <= x <= upper`.

    Args:
        objective: [variables]; scale it so that 1e-6, HiGHS's absolute gap, is negligible.
        rows: scipy sparse array [rows, variables].
        row_bounds: low and high, [rows] each.
        integers: which variables are integers, [variables].
        upper: [variables]; inf where there is no limit.
        time_limit_seconds: when to stop and hand back the best solution so far.
        relative_gap: fraction of the solution's objective by which the bound may be below it.
        node_limit: when to stop likewise, whatever the machine's speed; None for no limit.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    options: dict[str, float] = {
        "mip_rel_gap": relative_gap,
        "time_limit": max(time_limit_seconds, 0.0),
    }
    if node_limit is not None:
        options["node_limit"] = node_limit
    with quiet_stdout():
        result = milp(
            objective,
            integrality=integers.astype(np.int64),
            bounds=Bounds(0.0, upper),
            constraints=LinearConstraint(rows, *row_bounds),
            options=options,
        )
    bound = result.mip_dual_bound
    known = bound is not None and math.isfinite(bound)
    return HighsAnswer(
        values=result.x,
        bound=float(bound) if known else -math.inf,
        infeasible=result.status == _INFEASIBLE,
    )


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Discard what C code prints to file descriptor 1 in the meantime.

    The HiGHS in scipy 1.17 prints a debugging line in some solves whatever its options say, which
    would break a program that reads our JSON. One thread at a time gets in.
    """
    with _stdout_lock:
        try:
            saved = os.dup(1)
        except OSError:  # standard output is closed: nothing can leak
            yield
            return
        _flush_c_buffers()
        sink = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(sink, 1)
            yield
        finally:
            # C buffers its output when it is not a terminal; it must go before 1 is itself again.
            _flush_c_buffers()
            os.dup2(saved, 1)
            os.close(saved)
            os.close(sink)


def _flush_c_buffers() -> None:
    # Where the C library cannot be reached by this name (Windows), output is unbuffered enough.
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).fflush(None)
