"""The other processes of a refinement: started here, and what they run.

Each is a Python of its own that opens the store, reads the model and takes trials. Its order comes
as JSON on standard input, where no list of processes shows a password.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any

from autoq.errors import AutoqError
from autoq.progress import Progress, SilentProgress
from autoq.studies import PlanRecord

if TYPE_CHECKING:
    from autoq.api.study import Study

_END_SECONDS = 5.0  # a helper looks for work twice a second; a late one may still load its model
_REFUSED = 2


@contextmanager
def started_helpers(
    study: Study, plan: PlanRecord, options: Mapping[str, Any], count: int, progress: Progress
) -> Iterator[None]:
    """Processes that take trials of the refinement, until the context ends.

    They end by themselves when there are enough trials. One that fails is reported; its trial is
    tried again by the others.
    """
    order = trials_order(study, plan, options)
    helpers = [_Helper(order, count + 1) for _ in range(count)]
    try:
        with fewer_threads(threads_each(count + 1)):
            yield
    except BaseException:
        for helper in helpers:
            helper.stop()
        raise
    finally:
        for message in filter(None, [helper.end() for helper in helpers]):
            progress.note(f"a worker ended early: {message}; its trial was tried again")


def trials_order(study: Study, plan: PlanRecord, options: Mapping[str, Any]) -> dict[str, Any]:
    """What `take_trials` has to know, as plain data."""
    return {
        "store": study.store.url,
        "study": study.id,
        "plan": plan.id,
        "options": dict(options),
        "trust_remote_code": study.trusts_remote_code,
    }


class _Helper:
    """One process."""

    def __init__(self, order: Mapping[str, Any], workers: int) -> None:
        self._stopped = False
        self._errors: IO[str] = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed in `end`)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "autoq.api.refinement.process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
            text=True,
            env={"OMP_NUM_THREADS": str(threads_each(workers)), **os.environ},
        )
        assert self._process.stdin is not None  # it is a pipe
        self._process.stdin.write(json.dumps(order))
        self._process.stdin.close()

    def end(self) -> str:
        """Wait for the end, or bring it about; what went wrong, in a line, if anything did."""
        try:
            code = self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.stop()
            code = self._process.wait()
        with self._errors as errors:
            errors.seek(0)
            lines = errors.read().strip().splitlines()
        if not code or self._stopped:
            return ""
        if code < 0:  # what it wrote before says nothing of that
            return f"killed by signal {-code}"
        return lines[-1] if lines else f"exit code {code}"

    def stop(self) -> None:
        """End the process now; what it was measuring is tried again by whoever comes next."""
        self._stopped = True
        self._process.terminate()


def threads_each(workers: int) -> int:
    """Threads of a process, so that all together have one on each core."""
    return max(1, (os.cpu_count() or 1) // workers)


@contextmanager
def fewer_threads(most: int | None) -> Iterator[None]:
    """At most so many threads of torch, until the context ends; None leaves them as they are."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(before if most is None else min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def main() -> int:
    """Take trials as the order on standard input says."""
    try:
        take_trials(json.load(sys.stdin))
    except AutoqError as error:
        print(error, file=sys.stderr)
        return _REFUSED
    return 0


def take_trials(order: Mapping[str, Any]) -> None:
    """Measure trials of a refinement until there are enough.

    Args:
        order: what `trials_order` gave.
    Raises:
        AutoqError: the study, its model or its data cannot be had here.
    """
    from autoq.api.opening import open_study
    from autoq.api.refinement._data import refine_data
    from autoq.api.refinement.refining import RefineOptions, open_trials, work

    options = dict(order["options"])
    for name in ("strategies", "constraints"):
        options[name] = tuple(options[name])
    study = open_study(
        str(order["study"]), order["store"], trust_remote_code=order["trust_remote_code"]
    )
    plan = study.store.plan(order["plan"])
    chosen = RefineOptions(**options)
    trials = open_trials(study, plan, chosen)
    work(study, plan, chosen, trials, refine_data(study, chosen), SilentProgress())


if __name__ == "__main__":
    sys.exit(main())
