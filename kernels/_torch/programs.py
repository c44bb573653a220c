"""What can be compiled for CPUs, and how it runs over a large tensor, a piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

PIECE_ELEMENTS = 2**18
"""Large against the 10 microseconds that calling a stage takes, small against the caches."""

_WIDEST_ROW = 128
_NARROWEST_ROW = 16

Stage = Callable[..., None]
"""(x, *operands, *scratch, out): a pure function but for what it copies into scratch and `out`."""

Eager = Callable[[Tensor], Tensor]
"""The eager body's results for a tensor that stands for the operand's first rows."""


def _no_scratch(_: Tensor) -> tuple[Tensor, ...]:
    return ()


@dataclass(frozen=True, slots=True, eq=False)
class Program:
    """Functions of one piece, run one after the other.

    With a width, pieces are [PIECE_ELEMENTS / width, width] whatever the tensor's rows are, and
    operands are scalars. Without, rows are those of the tensor or, of rows wider than 128, parts,
    and operands are scalars or [rows, 1].
    """

    name: str
    stages: tuple[Stage, ...]
    width: int | None
    scratch: Callable[[Tensor], tuple[Tensor, ...]] = field(default=_no_scratch)


@dataclass(frozen=True, slots=True, eq=False)
class Call:
    """A program and its float32 operands for one tensor."""

    program: Program
    operands: tuple[Tensor, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Offer:
    """A program for one tensor, whose operands are computed only if it is run.

    `operands` takes the tensor's rows, or others that stand for the first of them.
    """

    program: Program
    operands: Callable[[Tensor], tuple[Tensor, ...]]

    def call(self, rows: Tensor) -> Call:
        """With the operands for `rows`."""
        operands = self.operands(rows)
        own = tuple(operand[: len(rows)] if operand.ndim else operand for operand in operands)
        return Call(self.program, own)


def width_of(program: Program, rows: Tensor) -> int:
    """Elements in a row of a piece; 0 where the tensor's rows do not make pieces."""
    if program.width is not None:
        return program.width
    width = math.gcd(rows.shape[1], _WIDEST_ROW)
    return width if width >= _NARROWEST_ROW else 0


def whole_pieces(rows: Tensor) -> int:
    """How many elements at the tensor's beginning make whole pieces."""
    return rows.numel() // PIECE_ELEMENTS * PIECE_ELEMENTS


def pieces(call: Call, rows: Tensor, out: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """(x, *operands, out) of every whole piece of two contiguous tensors [n, width]."""
    width, elements = width_of(call.program, rows), whole_pieces(rows)
    narrow = rows.view(-1)[:elements].view(-1, width)
    results = out.view(-1)[:elements].view(-1, width)
    operands = [
        operand.repeat_interleave(rows.shape[1] // width, dim=0) if operand.ndim else operand
        for operand in call.operands
    ]
    step = PIECE_ELEMENTS // width
    for start in range(0, len(narrow), step):
        piece = slice(start, start + step)
        own = (operand[piece] if operand.ndim else operand for operand in operands)
        yield narrow[piece], *own, results[piece]


def run_stages(stages: tuple[Stage, ...], call: Call, rows: Tensor, out: Tensor) -> None:
    """Run stages, compiled or not, over every whole piece."""
    scratch: tuple[Tensor, ...] | None = None
    for x, *operands, result in pieces(call, rows, out):
        if scratch is None:
            scratch = call.program.scratch(x)
        for stage in stages:
            stage(x, *operands, *scratch, result)
