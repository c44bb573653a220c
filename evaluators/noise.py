"""The noise floor: how far the original is from itself, computed with one more rounding.

A model that runs in bfloat16 rounds every product, and another engine, batch size or kernel rounds
it otherwise. The KL divergence that such rounding causes is what nobody can avoid, and differences
between quantised models below it mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from autoq.layers.taps import MatrixCall, tapped
from autoq.models import WeightSlot

_EXPONENT_BITS = 0x7F800000  # of a float32, whose exponent is that of bfloat16
_PLACES = 7  # binary places of a bfloat16's significand
_STEP_PROBABILITY = 1 / 24


@contextmanager
def rounding_noise(
    model: nn.Module,
    slots: Iterable[WeightSlot],
    blocks: Iterable[str],
    generator: torch.Generator,
) -> Iterator[None]:
    """Round the output of every product with a slot, and of every block, once more to bfloat16.

    A float32 model feels this rounding alone, so its floor is a low one. In a bfloat16 model every
    other operation rounds, too, and otherwise than before because its input has changed: the floor
    is then what two runs of it differ by.

    The model is as before when the context ends. Where a slot is tapped already, that tap is out
    of force meanwhile.

    Args:
        blocks: paths of the repeated layers, as in `ModelMap.blocks`; what they give is the
            residual stream, which a bfloat16 model rounds, too.
        generator: of the noise, on the model's device; it goes on where it was left, so every
            batch gets noise of its own.

    Source: the idea of measuring the reference against itself with rounding to bfloat16 after
    every layer is that of exllamav3's qbench.
    """
    with ExitStack() as stack:
        stack.enter_context(tapped(model, slots, partial(_noisy_product, generator)))
        for path in blocks:
            hook = partial(_noisy_output, generator)
            stack.enter_context(model.get_submodule(path).register_forward_hook(hook))
        yield


def rounded_again(values: Tensor, generator: torch.Generator) -> Tensor:
    """`values` with an error of the size that rounding to bfloat16 makes; same shape and dtype.

    With u the unit in the last place that a value has in bfloat16 (2^-7 of the power of two below
    it), wider types get an error drawn evenly from [-u/2, u/2], which is that of rounding to
    nearest. bfloat16 itself has no value in between: each moves to one of its neighbours with
    probability 1/24 either way. That error has the same mean, 0, and variance, u^2 / 12. Zeros
    stay: they are exact.
    """
    unit = _unit_in_the_last_place(values)
    share = torch.rand(values.shape, generator=generator, device=values.device) - 0.5
    if values.dtype == torch.bfloat16:
        outermost = share.abs() > 0.5 - _STEP_PROBABILITY
        share = torch.where(outermost, share.sign(), torch.zeros_like(share))
    return values + (share * unit).to(values.dtype)


def _unit_in_the_last_place(values: Tensor) -> Tensor:
    exponent = values.float().view(torch.int32) & _EXPONENT_BITS
    return exponent.view(torch.float32) * 2.0**-_PLACES


def _noisy_product(generator: torch.Generator, call: MatrixCall, inputs: Tensor) -> Tensor:
    return rounded_again(call.compute(inputs), generator)


def _noisy_output(generator: torch.Generator, _module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A block's output with noise; of several values the first is the residual stream."""
    if isinstance(output, Tensor):
        return rounded_again(output, generator)
    if isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        return (rounded_again(output[0], generator), *output[1:])
    return output
