"""Compiling in worker processes: all cores work, and a compiler that crashes fails one launch."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import TypeAlias

from autoq.kernels._compile_cases import compile_cases
from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels.compile_check import CheckedLaunch, check, unchecked
from autoq.kernels.targets import TARGETS

Task: TypeAlias = tuple[CompileCase, str]  # and the target's name


def check_all(tasks: Sequence[Task], processes: int | None = None) -> Iterator[CheckedLaunch]:
    """`compile_check.check` of every task, each as soon as it is there.

    Args:
        tasks: cases of `compile_cases()`, with the names of targets.
        processes: how many; as many as there are cores if left out.
    """
    waiting = deque(tasks)
    count = min(processes or os.cpu_count() or 1, len(tasks))
    with _workers(count) as workers:
        for worker in workers:
            worker.give(waiting.popleft())
        while busy := {worker.connection: worker for worker in workers if worker.task}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                yield worker.result()
                if waiting:
                    worker.give(waiting.popleft())


class _Worker:
    """A process that compiles one task at a time; a new one is started where it dies."""

    connection: Connection
    task: Task | None = None

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        # Spawned, not forked: torch and the compiler have threads.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def give(self, task: Task) -> None:
        """Hand over a task; of a process that is dead already, `result` says so."""
        self.task = task
        case, target = task
        # Not to be taken for our own output's reader having gone, which is no failure.
        with suppress(ConnectionError):
            self.connection.send((case.name, target))

    def result(self) -> CheckedLaunch:
        """What came back, or that the process died."""
        assert self.task is not None
        (case, target), self.task = self.task, None
        try:
            found: CheckedLaunch = self.connection.recv()
        except (EOFError, ConnectionError):
            self.process.join()
            reason = f"the compiler ended its process with code {self.process.exitcode}"
            self._start()
            return unchecked(case, target, reason)
        return found

    def stop(self) -> None:
        self.process.terminate()
        self.process.join()


@contextmanager
def _workers(count: int) -> Iterator[list[_Worker]]:
    workers = [_Worker() for _ in range(count)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.stop()


def _work(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    cases = {(case.name, target): case for case in compile_cases() for target in case.targets}
    while True:
        try:
            task = connection.recv()
        except EOFError:  # the parent is gone
            return
        connection.send(check(cases[task], TARGETS[task[1]]))
