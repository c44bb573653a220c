"""Taking time: the one thing that differs between devices."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from autoq.kernels._benchmark.case import Work

_FLUSH_BYTES = 2**30
"""Written before each repetition on a GPU: more than any level-2 cache, and long enough (some 250
microseconds at 4 TB/s) that the kernels to be timed are queued before the GPU gets to them."""


class Timer(Protocol):
    """Times one repetition."""

    def seconds(self, work: Work) -> float:
        """How long `work` takes, with caches that do not hold its operands."""
        ...


def give_back_memory() -> None:
    """Return what is free to the system, so that large results lie in new memory.

    glibc does so or not depending on what was freed before, and a result in new memory takes twice
    the time or more: its pages are cleared first. Elsewhere than on glibc nothing happens.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


class HostTimer:
    """Time on the CPU. Caches are left as they are: the tensors that matter do not fit them.

    With one thread it is that thread's processor time, to which other work on the machine adds
    little; with more threads it is wall time.
    """

    def __init__(self) -> None:
        one_thread = torch.get_num_threads() == 1
        self._clock = time.thread_time if one_thread else time.perf_counter

    def seconds(self, work: Work) -> float:
        """See `Timer.seconds`."""
        started = self._clock()
        work()
        return self._clock() - started


class GpuTimer:
    """Time on the GPU between two events, after its level-2 cache was overwritten."""

    def __init__(self, device: torch.device) -> None:
        self._flush: Tensor = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        event: Callable[..., Any] = torch.cuda.Event
        self._events = event(enable_timing=True), event(enable_timing=True)

    def seconds(self, work: Work) -> float:
        """See `Timer.seconds`."""
        started, ended = self._events
        self._flush.zero_()
        started.record()
        work()
        ended.record()
        ended.synchronize()
        return float(started.elapsed_time(ended)) / 1000.0


def timer_for(device: torch.device) -> Timer:
    """The timer of a device."""
    return GpuTimer(device) if device.type == "cuda" else HostTimer()


@dataclass(frozen=True, slots=True)
class Plan:
    """How often to repeat."""

    repetitions: int
    """Of each contender, if time allows."""
    fewest: int
    """Of each contender, whatever time they take."""
    seconds: float
    """After which a contender has no further repetitions."""
    warm_up: int = 2


def take_turns(
    timer: Timer, contenders: Mapping[str, Work], plan: Plan, before: Work | None = None
) -> dict[str, list[float]]:
    """Seconds of each repetition of each contender, by turns, so that all see the same machine.

    `before` comes before each repetition and is not timed.
    """
    for work in contenders.values():
        for _ in range(plan.warm_up):
            work()
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(plan.repetitions):
        for name, work in contenders.items():
            if turn < plan.fewest or sum(seconds[name]) < plan.seconds:
                if before is not None:
                    before()
                seconds[name].append(timer.seconds(work))
    return seconds
