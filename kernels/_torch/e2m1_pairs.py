"""E2M1 codes of bfloat16 blocks, two values to a 32-bit word: the CPU path of 4-bit weights.

Bit patterns are worked on as integers, so that even and odd values come apart by a shift and a mask,
and their codes together by an addition. Between powers of two p, E2M1 counts steps of p / 2: adding
2**22 * p rounds a magnitude to such steps, to nearest, ties to even, and leaves their number in the
lowest bits of the sum; each of the powers 1, 2 and 4 that is reached puts the code two further. Three
times as fast as `e2m1.encode`, which takes what this does not: NaN, and scales so large that a
quotient may vanish.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from autoq.kernels._torch import e2m1
from autoq.kernels._torch.chunks import block_maxima, rows_per_piece

_LARGEST_STEP = 2.0**16
"""Of the smallest bfloat16, 2**-133, it leaves the smallest float32."""

_PIECES_AT_ONCE = 4
"""Twenty short operations follow each other here, of which the calls cost more than the memory."""

_BOTH_MAGNITUDES = 0x7FFF7FFF
_UPPER_MAGNITUDE = 0x7FFF0000
_BOTH_SIGNS_SHIFTED = 0x00080008
_INFINITY = 0x7F80  # of a bfloat16
_EXPONENT = 0x7F800000  # of a float32
_MANTISSA_BITS = 23

_COUNT_STEPS = 2.0**22 + 1.0
"""Times a power, this makes the sum's lowest byte the number of steps and two."""


def takes(x: Tensor) -> bool:
    """Whether `blocks` takes the tensor: bfloat16, on a CPU, not empty."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and bool(x.numel())


def blocks(x: Tensor, block: int) -> Iterator[tuple[slice, Blocks]]:
    """Cache-sized pieces of a tensor's blocks: which blocks, and their values.

    They all work in the same memory: one has to be done with before the next is asked for.

    Args:
        x: one that `takes` takes, its size a multiple of `block`.
        block: an even power of two.
    """
    values = x.detach().contiguous().view(-1)
    if values.data_ptr() % 4 or values.storage_offset() % 2:
        values = values.clone()
    words = values.view(torch.int32).view(-1, block // 2)
    step = min(_PIECES_AT_ONCE * rows_per_piece(values.view(-1, block)), len(words))
    memory = _Memory(step, block)
    for start in range(0, len(words), step):
        piece = slice(start, min(start + step, len(words)))
        yield piece, Blocks(words[piece], memory)


class _Memory:
    """What a piece is worked on in: taken anew for each, it would be cleared each time."""

    def __init__(self, count: int, block: int) -> None:
        half = block // 2
        self.magnitudes = torch.empty(count, half, dtype=torch.int32)
        self.values = torch.empty(2, count, half)
        self.powers = torch.empty(2, count, half)


class Blocks:
    """A piece of a tensor: `count` blocks of bfloat16 values, in pairs."""

    def __init__(self, words: Tensor, memory: _Memory) -> None:
        """
        Args:
            words: int32 [count, block/2], the even value in the lower half.
        """
        self.count, self._half = words.shape
        count = self.count
        self._words = words
        self._magnitudes = memory.magnitudes[:count]
        self._values, self._powers = memory.values[:, :count], memory.powers[:, :count]
        self._maxima: Tensor | None = None
        torch.bitwise_and(words, _BOTH_MAGNITUDES, out=self._magnitudes)

    def amax(self) -> Tensor:
        """The largest magnitude of each block, float32 [count, 1]; NaN where there is one."""
        # Magnitudes are ordered as integers, NaN last.
        magnitudes = self._magnitudes.view(torch.int16).view(-1)
        maxima = block_maxima(magnitudes, 2 * self._half, self._powers.view(torch.int16).flatten(1))
        self._maxima = maxima
        return maxima.view(torch.bfloat16).float()

    def packed(self, step: Tensor, divided: Callable[[Tensor], Tensor]) -> Tensor:
        """Codes of value / step, packed: numbers [count, block/2] whose lowest byte holds them.

        Args:
            step: float32 [count, 1].
            divided: makes quotients of the float32 values [count, block], of which it may dispose,
                for pieces that are not taken here.
        """
        smallest, largest = torch.aminmax(step)
        if not (smallest > 0 and largest <= _LARGEST_STEP) or self._have_nan():
            values = self._words.view(torch.bfloat16).float()
            return e2m1.pack(e2m1.encode(divided(values)))
        codes = self._codes(step)
        return codes.add_(self._signs())

    def _have_nan(self) -> bool:
        magnitudes = self._magnitudes.view(torch.int16) if self._maxima is None else self._maxima
        return bool(magnitudes.max() > _INFINITY)

    def _codes(self, step: Tensor) -> Tensor:
        """Of the magnitudes, int32; only the lowest byte means something."""
        bits = self._values.view(torch.int32)
        torch.bitwise_left_shift(self._magnitudes, 16, out=bits[0])
        torch.bitwise_and(self._magnitudes, _UPPER_MAGNITUDE, out=bits[1])
        # Repeated first: dividing rows of 8 by a number each is no vector operation.
        steps = torch.from_numpy(np.repeat(step.numpy(), self._half, axis=1))
        torch.div(self._values, steps, out=self._values)
        self._values.clamp_(max=e2m1.LARGEST)
        powers = self._powers.view(torch.int32)
        torch.bitwise_and(bits, _EXPONENT, out=powers)
        self._powers.clamp_(min=1.0)
        torch.add(self._values, self._powers, alpha=_COUNT_STEPS, out=self._values)
        counts = torch.add(bits[0], bits[1], alpha=16, out=bits[0])
        reached = torch.add(powers[0], powers[1], alpha=16, out=powers[0])
        # The lowest bit of the exponent becomes the second: the power 2**e gives 2 * e - 2.
        return counts.add_(reached.bitwise_right_shift_(_MANTISSA_BITS - 1))

    def _signs(self) -> Tensor:
        """Bits 3 and 7 of the lowest byte, int32; zeros have none. Magnitudes are lost."""
        # A carry into a sign's place tells what is not zero from zero.
        signs = self._magnitudes.add_(_BOTH_MAGNITUDES).bitwise_and_(self._words)
        signs.bitwise_right_shift_(12).bitwise_and_(_BOTH_SIGNS_SHIFTED)
        upper = torch.bitwise_right_shift(signs, 12, out=self._powers.view(torch.int32)[0])
        return signs.add_(upper)
