"""Float32 arithmetic on large tensors, a cache-sized piece at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from autoq.kernels._checks import SMALLEST_SCALE
from autoq.kernels._torch import compiled
from autoq.kernels._torch.programs import Offer

# Measured optimum with a level-2 cache of 2 MiB: smaller pieces pay for more calls, larger ones
# for memory traffic.
_ELEMENTS_PER_THREAD = 2**17

_PIECES_AT_ONCE = 4
"""Where two or three operations follow each other: there calls cost more than memory traffic."""

_LARGE_BYTES = 4 << 20
"""From where numpy asks for large pages."""

Body = Callable[[Tensor, Tensor, Tensor, slice], None]
"""(source, values, scratch, rows): compute the result of `source` into `values`.

All are float32 [rows, width]; `source` may be the same tensor as `values`, so it is lost with the
first write there; `scratch` holds anything. `rows` says which rows of the operand they are.
"""


def divide(dividend: Tensor, divisor: float) -> Tensor:
    """`dividend / divisor`, correctly rounded on every device.

    On accelerators torch multiplies by the reciprocal of a divisor that is a host number.
    """
    return dividend / torch.tensor(divisor, dtype=dividend.dtype, device=dividend.device)


def scale_from_amax(amax: Tensor, largest: float) -> Tensor:
    """The scale that maps `amax` onto `largest`: their quotient; 1 where amax is 0."""
    scale = divide(amax, largest).clamp_(min=SMALLEST_SCALE)
    return torch.where(amax == 0, 1.0, scale)


def map_rows(x: Tensor, width: int, body: Body, fused: Offer | None = None) -> Tensor:
    """Apply `body` to the rows of `x` seen as [-1, width], in float32, piece by piece.

    Args:
        x: any floating dtype, any strides; it is left as it is.
        width: elements in a row; divides the size of `x`.
        body: what to do with each piece.
        fused: the same to compile, once that pays, on CPUs.

    Returns:
        The results, contiguous, in the shape and dtype of `x`, detached from any graph.
    """
    if not x.numel():
        return x.detach().clone()
    rows = x.detach().reshape(-1, width)
    out = torch.empty(rows.shape, dtype=x.dtype, device=x.device)

    def eager(sample: Tensor) -> Tensor:
        return _map(sample, torch.empty_like(sample), body, 0)

    done = 0 if fused is None else compiled.run(fused, rows, out, eager)
    return _map(rows, out, body, done).view(x.shape)


def _map(rows: Tensor, out: Tensor, body: Body, done: int) -> Tensor:
    """Apply `body` to the rows that are not done."""
    step = min(rows_per_piece(rows), len(rows) - done)
    scratch = torch.empty(step, rows.shape[1], dtype=torch.float32, device=rows.device)
    own = None if rows.dtype == torch.float32 else torch.empty_like(scratch)
    for start in range(done, len(rows), step or 1):
        piece = slice(start, min(start + step, len(rows)))
        count = piece.stop - piece.start
        if own is None:
            body(rows[piece], out[piece], scratch[:count], piece)
        else:
            values = own[:count].copy_(rows[piece])
            body(values, values, scratch[:count], piece)
            out[piece].copy_(values)
    return out


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory for what is soon given back, like torch.empty.

    What is large comes from numpy on CPUs, which asks the system for large pages: touching fresh
    memory, page by small page, costs more than computing what goes there. What is kept is better
    off in small ones: the system has few large pages at hand, and looking for more takes longer.
    """
    size = math.prod(shape) * dtype.itemsize
    if device.type != "cpu" or size < _LARGE_BYTES:
        return torch.empty(*shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(size, dtype=np.uint8)).view(dtype).view(*shape)


def float32_pieces(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of a matrix as float32, which a cache or two hold: which rows, and their values.

    They all lie in the same memory, which may be overwritten.
    """
    step = _PIECES_AT_ONCE * rows_per_piece(rows)
    size = min(step, len(rows)), rows.shape[1]
    values = torch.empty(size, dtype=torch.float32, device=rows.device)
    for start in range(0, len(rows), step):
        piece = slice(start, min(start + step, len(rows)))
        yield piece, values[: piece.stop - start].copy_(rows[piece])


def row_amax(rows: Tensor) -> Tensor:
    """The largest magnitude of each row of a matrix, in its dtype; NaN where there is one.

    Magnitudes go to one piece of memory: freed and taken again for every piece, it would be given
    back to the system and cleared each time. Those of 16-bit floats are compared as integers, which
    order them alike, NaN last, in half the time.
    """
    step = _PIECES_AT_ONCE * rows_per_piece(rows)
    scratch = torch.empty(min(step, len(rows)), rows.shape[1], dtype=rows.dtype, device=rows.device)
    pieces = torch.split(rows, step)
    if rows.dtype.itemsize != 2:
        return torch.cat([torch.abs(piece, out=scratch[: len(piece)]).amax(-1) for piece in pieces])
    largest = []
    for piece in pieces:
        bits = scratch[: len(piece)].view(torch.int16)
        torch.bitwise_and(piece.view(torch.int16), 0x7FFF, out=bits)
        largest.append(bits.amax(-1))
    return torch.cat(largest).view(rows.dtype)


def block_maxima(values: Tensor, block: int, scratch: Tensor) -> Tensor:
    """The largest of every `block` integers, a power of two of them, [count, 1].

    The row of them, shifted by half a block, a quarter and so on, is compared with itself: most of
    that is for nothing, but contiguous, and several times as fast as maxima of short rows.

    Args:
        values: [count * block].
        scratch: of the same dtype, [2, at least count * block], overwritten.
    """
    source, (one, other) = values, scratch
    known, distance = len(values), block // 2
    while distance:
        known -= distance
        torch.maximum(source[:known], source[distance : known + distance], out=one[:known])
        source, one, other = one, other, one
        distance //= 2
    return source[: len(values)].view(-1, block)[:, :1].contiguous()


def bfloat16_block_amax(rows: Tensor) -> Tensor:
    """The largest magnitude of each row, float32 [rows, 1]; NaN where there is one.

    Args:
        rows: bfloat16 [rows, a power of two], contiguous, on a CPU.
    """
    magnitudes = torch.bitwise_and(rows.view(torch.int16), 0x7FFF).view(-1)
    scratch = torch.empty(2, len(magnitudes), dtype=torch.int16)
    return block_maxima(magnitudes, rows.shape[1], scratch).view(torch.bfloat16).float()


def rows_per_piece(rows: Tensor) -> int:
    """How many rows of a matrix to work on at once: on a GPU all of them."""
    if rows.device.type != "cpu":
        return max(1, len(rows))
    return max(1, _ELEMENTS_PER_THREAD * torch.get_num_threads() // rows.shape[1])


def exponent_part_(values: Tensor, out: Tensor) -> Tensor:
    """Write the largest power of two that is not above |value| to `out`; all are float32.

    Subnormal numbers give 0; infinity and NaN give infinity.
    """
    torch.bitwise_and(values.view(torch.int32), 0x7F800000, out=out.view(torch.int32))
    return out
