"""One process at a time works on a study."""

from __future__ import annotations

import logging
import os
import socket
import time
import uuid
from datetime import datetime, timedelta
from types import TracebackType
from typing import Any, Self

import psutil  # type: ignore[import-untyped]
from sqlalchemy import CursorResult, delete, select, update

from autoq.errors import StoreError, StudyLockedError
from autoq.studies._clock import Instant, now
from autoq.studies._database import Database, StoreConflictError
from autoq.studies._encoding import iso_time
from autoq.studies._schema import LeaseColumns, LeaseRow, StudyRow
from autoq.studies.records import LeaseRecord

logger = logging.getLogger(__name__)

LEASE_SECONDS = 600.0
"""How long a lease lasts without a heartbeat: longer than any batch should take."""

LOST = (
    "this process no longer holds its study: it gave no sign of life for too long and another "
    "process took the study over; what was stored is intact, so run again when the other has ended"
)

_POLL_SECONDS = 0.2
# Start times count in clock ticks of 0.01 s; the rest is rounding.
START_TOLERANCE_SECONDS = 0.05


class StudyLease:
    """The right to work on one study, held from `__enter__` to `__exit__`.

    Call `heartbeat()` more often than the lease lasts. There is no thread behind it on purpose:
    a process that hangs must lose its lease. It also ends, at once, when its process is found
    dead on the same host. While it is held, each write to the study through the same open store
    makes sure, in its own transaction, that nobody has taken it over. Clocks that are set forward
    or back neither end nor prolong it.
    """

    def __init__(
        self, database: Database, study_id: int, *, wait_seconds: float, lease_seconds: float
    ) -> None:
        self._database = database
        self._study_id = study_id
        self._wait_seconds = wait_seconds
        self._lease_seconds = lease_seconds
        self._owner = uuid.uuid4().hex

    def __enter__(self) -> Self:
        """Take the lease, waiting for it where that was asked for.

        Raises:
            StudyLockedError: another process still holds it.
        """
        deadline = time.monotonic() + self._wait_seconds
        while True:
            holder = self._try_to_acquire()
            if holder is None:
                self._database.held_leases[self._study_id] = self._owner
                return self
            if time.monotonic() >= deadline:
                raise StudyLockedError(self._refusal(holder))
            time.sleep(_POLL_SECONDS)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the lease back."""
        if self._database.held_leases.get(self._study_id) == self._owner:
            del self._database.held_leases[self._study_id]
        try:
            with self._database.write() as session:
                session.execute(delete(LeaseRow).where(LeaseRow.owner == self._owner))
        except StoreError as failure:
            # It ends by itself; what happened inside the block matters more.
            logger.warning("the lease was not given back: %s", failure)

    def heartbeat(self) -> None:
        """Say that the work goes on.

        Raises:
            StudyLockedError: the lease had run out, and another process has taken it.
        """
        with self._database.write() as session:
            ours = (LeaseRow.study_id == self._study_id, LeaseRow.owner == self._owner)
            moment = now(session)
            renewal = update(LeaseRow).where(*ours).values(renewed(moment, self._lease_seconds))
            result = session.execute(renewal)
            is_ours = isinstance(result, CursorResult) and result.rowcount == 1
        if not is_ours:
            raise StudyLockedError(LOST)

    def _try_to_acquire(self) -> LeaseRecord | None:
        """None when the lease is ours now, else who holds it."""
        try:
            return self._claim_unless_held()
        except StoreConflictError:
            # Two processes took a free study at the same instant; the other one has it now.
            return self._claim_unless_held()

    def _claim_unless_held(self) -> LeaseRecord | None:
        with self._database.write() as session:
            found = select(LeaseRow).where(LeaseRow.study_id == self._study_id)
            row = session.scalars(found.with_for_update()).one_or_none()
            moment = now(session)  # after the row was locked, which may have taken a while
            if row is not None and is_alive(row, moment):
                return _record(row)
            if row is None:
                row = LeaseRow(study_id=self._study_id)
                session.add(row)
            else:
                logger.warning(
                    "taking over a study from process %d on %s, which gave no sign of life",
                    row.pid,
                    row.host,
                )
            hold(row, self._owner, moment, self._lease_seconds)
        return None

    def _refusal(self, holder: LeaseRecord) -> str:
        with self._database.read() as session:
            name = session.scalar(select(StudyRow.name).where(StudyRow.id == self._study_id))
        held = f"still held after {self._wait_seconds:g} s" if self._wait_seconds else "held"
        return (
            f"one process at a time works on a study, and {name!r} is {held} by process "
            f"{holder.pid} on host {holder.host} since {_to_the_second(holder.acquired)}; wait "
            "until it ends or stop it, then run again (without a sign of life its hold ends "
            f"{_to_the_second(holder.expires)})"
        )


def hold(row: LeaseColumns, owner: str, moment: Instant, lease_seconds: float) -> None:
    """Make this process the holder of what the row is the lease of."""
    row.owner = owner
    row.host = socket.gethostname()
    row.pid_namespace = pid_namespace()
    row.pid = os.getpid()
    row.process_started = process_started(row.pid) or 0.0
    row.acquired = moment.wall
    for name, value in renewed(moment, lease_seconds).items():
        setattr(row, name, value)


def renewed(moment: Instant, lease_seconds: float) -> dict[str, Any]:
    """The columns that say when a lease ends that shows its last sign of life now."""
    return {
        "heartbeat": moment.wall,
        "expires": moment.wall + timedelta(seconds=lease_seconds),
        "expires_uptime": moment.uptime + lease_seconds,
        "boot_id": moment.boot_id,
    }


def process_started(pid: int) -> float | None:
    """When the process started, in seconds since boot; None when there is no such process.

    Counted from boot, because the clock on the wall is set now and then.
    """
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time() - psutil.boot_time())
    except (psutil.NoSuchProcess, ProcessLookupError):
        return None


def pid_namespace() -> str:
    """What tells apart containers that share a host name; empty where there is no such thing."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def is_alive(row: LeaseColumns, moment: Instant) -> bool:
    """Whether the process that holds the lease may still be at work."""
    if moment.has_passed(row.expires, row.expires_uptime, row.boot_id):
        return False
    if (row.host, row.pid_namespace) != (socket.gethostname(), pid_namespace()):
        return True
    try:
        started = process_started(row.pid)
    except psutil.AccessDenied:
        return True  # it exists, and belongs to someone else
    # Another start time: the number was given to another process.
    return started is not None and abs(started - row.process_started) <= START_TOLERANCE_SECONDS


def _record(row: LeaseRow) -> LeaseRecord:
    return LeaseRecord(
        study_id=row.study_id,
        host=row.host,
        pid=row.pid,
        acquired=iso_time(row.acquired),
        heartbeat=iso_time(row.heartbeat),
        expires=iso_time(row.expires),
    )


def _to_the_second(moment: str) -> str:
    return f"{datetime.fromisoformat(moment):%Y-%m-%d %H:%M:%S} UTC"
