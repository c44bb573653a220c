"""The process that does one job: `python -m autoq.service.jobs.job DESCRIPTOR`, started by a runner.

What is to be done comes through standard input, as JSON; what happens goes to the descriptor, as
JSON lines. Here, and nowhere else in the service, models are loaded.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from autoq.errors import AutoqError
from autoq.service.jobs._parents import end_with
from autoq.service.jobs._speech import Speech
from autoq.service.problems import Refusal, problem_of, shown_text
from autoq.wire import Problem

_FAILED = 1
_ASKED_TO_END = 128 + signal.SIGTERM
_FIRST_TO_GO = "500"
"""Of -1000 to 1000, for Linux: short of memory, it ends this process and not a server."""


def main() -> None:
    """Do the job; the exit code is 0 where it was done."""
    descriptor = int(sys.argv[1])
    os.set_inheritable(descriptor, False)
    order = json.loads(sys.stdin.buffer.read())
    end_with(order["parent"])
    signal.signal(signal.SIGTERM, _end)
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(_FIRST_TO_GO)
    speech = Speech(descriptor)
    try:
        speech.result(_done(order, speech))
    except Exception as error:  # noqa: BLE001  (whatever it is, the job's owner must hear of it)
        if not isinstance(error, AutoqError):
            traceback.print_exc()
        speech.problem(_problem(error).model_dump())
        sys.exit(_FAILED)


def _done(order: dict[str, Any], speech: Speech) -> dict[str, Any]:
    from autoq.service.jobs._tasks import perform

    return perform(order, speech)


def _problem(error: Exception) -> Problem:
    """As a reply of the server would have it; of what nobody foresaw the job's log says more."""
    if isinstance(error, AutoqError | OSError):
        return problem_of(error)
    said = shown_text(f"unexpected {type(error).__name__}: {error}")
    return problem_of(Refusal("internal", f"{said}; the job's log has the traceback"))


def _end(_number: int, _frame: FrameType | None) -> NoReturn:
    """Temporary files are removed and leases given back on the way out."""
    raise SystemExit(_ASKED_TO_END)


if __name__ == "__main__":
    main()
