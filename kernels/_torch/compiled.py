"""Bodies compiled to fused C++ loops by torch's inductor: the CPU path for large tensors.

A program is compiled for pieces of one size, so one compilation serves tensors of every shape;
what is left over, and everything before, takes the eager body. Compiling costs seconds (measured
with torch 2.13: 9 for the first program of a process, 3 where inductor finds its files of an
earlier one, 1 or 2 for each further program) and saves about 0.6 nanoseconds an element, so it
waits until the eager body has done the work that shows it will pay. The environment variable
`AUTOQ_CPU_COMPILE` changes that:

- `auto` (the default): after 2**33 elements on one thread, counted over large tensors only;
- `always`: at the first tensor that fills a piece;
- `never`: not at all, and what is compiled is not used.

Compiled code is used only if it gives the eager body's bits (NaN for NaN) on the first piece and
on one of awkward numbers, and is faster there; otherwise, and where there is no C++ compiler, the
eager body goes on, and `states` says why. Results therefore never depend on any of this.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from autoq.errors import InputError
from autoq.kernels._torch.building import build
from autoq.kernels._torch.programs import (
    PIECE_ELEMENTS,
    Eager,
    Offer,
    Program,
    Stage,
    run_stages,
    whole_pieces,
    width_of,
)

POLICY_VARIABLE = "AUTOQ_CPU_COMPILE"

ELEMENTS_BEFORE_FIRST = 2**33
"""About 15 seconds of eager work on one thread, of which a first compilation takes 9."""

ELEMENTS_BEFORE_EACH = 2**31
"""About 4 seconds of eager work; a further program compiles in 1 or 2."""

_log = logging.getLogger("autoq.kernels")


class Policy(StrEnum):
    """When programs are compiled."""

    AUTO = "auto"
    ALWAYS = "always"
    NEVER = "never"


_asked: ContextVar[Policy | None] = ContextVar("autoq_cpu_compile", default=None)


@contextmanager
def asking_for(policy: Policy) -> Iterator[None]:
    """Let another policy hold in this thread than the environment asks for."""
    token = _asked.set(policy)
    try:
        yield
    finally:
        _asked.reset(token)


def policy() -> Policy:
    """What `asking_for` or else the environment asks for.

    Raises:
        InputError: the variable has another value than auto, always or never.
    """
    asked = _asked.get()
    if asked is not None:
        return asked
    value = os.environ.get(POLICY_VARIABLE, "").strip().lower() or Policy.AUTO.value
    try:
        return Policy(value)
    except ValueError:
        raise InputError(
            f"{POLICY_VARIABLE} must be auto, always or never, got {value!r}; change or unset it"
        ) from None


@dataclass(frozen=True, slots=True)
class State:
    """How a program stands in this process, for people."""

    name: str
    dtype: str
    compiled: bool
    reason: str
    elements_offered: int
    """Of large tensors, whatever was run."""
    elements_compiled: int
    """Of tensors on which compiled code was run."""


class _Loops:
    """A program for one dtype and one width of rows; its compiled stages once there are any."""

    def __init__(self, program: Program, dtype: torch.dtype, width: int) -> None:
        self.program = program
        self.dtype = dtype
        self.width = width
        self.elements_offered = 0
        self.elements_compiled = 0
        self.decided = False
        self.stages: tuple[Stage, ...] = ()
        self.reason = ""

    def state(self) -> State:
        name = f"{self.program.name}, rows of {self.width}"
        waiting = f"{self.elements_offered:.2g} elements so far, too few for compiling to pay"
        return State(
            name,
            str(self.dtype).removeprefix("torch."),
            bool(self.stages),
            self.reason or waiting,
            self.elements_offered,
            self.elements_compiled,
        )


_loops: dict[tuple[Program, torch.dtype, int], _Loops] = {}
_compiling = threading.Lock()


def states() -> list[State]:
    """Every program that large tensors asked for in this process."""
    return [loops.state() for loops in list(_loops.values())]


def forget() -> None:
    """Begin anew, as in a new process."""
    _loops.clear()


def run(offer: Offer, rows: Tensor, out: Tensor, eager: Eager) -> int:
    """Run a program on as many whole pieces as there are.

    Args:
        offer: the program, with operands for all rows.
        rows: [n, width]; any device and strides, but only CPU and contiguous tensors are taken.
        out: like `rows`, contiguous; receives the results.
        eager: what to be equal to.

    Returns:
        How many rows of `out` are done; the others are the caller's.

    Raises:
        InputError: the environment variable has a value that it cannot have.
    """
    if rows.numel() < PIECE_ELEMENTS or not _usable(rows):
        return 0
    asked = policy()
    if asked is Policy.NEVER or not width_of(offer.program, rows):
        return 0
    loops = _loops_for(offer.program, rows)
    loops.elements_offered += rows.numel()
    if not loops.decided and (asked is Policy.ALWAYS or _pays(loops)):
        _decide(loops, offer, rows, eager)
    if not loops.stages:
        return 0
    run_stages(loops.stages, offer.call(rows), rows, out)
    loops.elements_compiled += rows.numel()
    return whole_pieces(rows) // rows.shape[1]


def _usable(rows: Tensor) -> bool:
    """Whether it is a plain CPU tensor in one stretch, and nobody traces what happens to it."""
    plain = type(rows) is Tensor and rows.device.type == "cpu" and rows.is_contiguous()
    return plain and not torch.compiler.is_compiling()


def _loops_for(program: Program, rows: Tensor) -> _Loops:
    key = (program, rows.dtype, width_of(program, rows))
    return _loops.get(key) or _loops.setdefault(key, _Loops(*key))


def _pays(loops: _Loops) -> bool:
    threads = torch.get_num_threads()
    total = sum(other.elements_offered for other in list(_loops.values()))
    enough = loops.elements_offered >= ELEMENTS_BEFORE_EACH * threads
    return enough and total >= ELEMENTS_BEFORE_FIRST * threads


def _decide(loops: _Loops, offer: Offer, rows: Tensor, eager: Eager) -> None:
    """Compile, and remember the outcome; while another thread compiles, do nothing."""
    if not _compiling.acquire(blocking=False):
        return
    try:
        if not loops.decided:
            loops.stages, loops.reason = build(offer, rows, eager)
            loops.decided = True
            _log.info("%s, %s: %s", loops.program.name, loops.dtype, loops.reason)
    finally:
        _compiling.release()
