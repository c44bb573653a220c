"""What time it is, by clocks that nobody sets while leases are held."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from sqlalchemy import Connection, text
from sqlalchemy.orm import Session

from autoq.studies._encoding import utc_now

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Instant:
    """Now, in every clock that tells how old a sign of life is.

    PostgreSQL's server has one clock for all its clients. A SQLite file is shared by the processes
    of one machine, whose uptime no one sets; the wall's clock is for what is left: machines that
    do not tell one boot from another.
    """

    wall: datetime  # of the server, where there is one
    uptime: float  # seconds since this machine was started, sleep left out
    boot_id: str  # of this machine since it was started; "" where times of day are the server's

    def has_passed(self, moment: datetime, uptime: float | None, boot_id: str | None) -> bool:
        """Whether a moment, told in the same three ways, is over."""
        if self.boot_id and boot_id == self.boot_id and uptime is not None:
            return self.uptime >= uptime
        return self.wall >= moment


def now(session: Session | Connection) -> Instant:
    """The time by the database's clock, or by the machine's where the database has none."""
    bind = session if isinstance(session, Connection) else session.get_bind()
    if bind.dialect.name == "postgresql":
        # Not now(), which is when the transaction began: it may have waited for a lock.
        wall = session.execute(text("SELECT clock_timestamp()")).scalar_one()
        return Instant(wall=wall, uptime=time.monotonic(), boot_id="")
    return Instant(wall=utc_now(), uptime=time.monotonic(), boot_id=boot_id())


@cache
def boot_id() -> str:
    """What tells this start of the machine from all others; "" where there is no such thing."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
