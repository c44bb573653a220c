"""Compiles a program's stages with torch's inductor, and proves them on data before use."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from autoq.kernels._torch.programs import (
    PIECE_ELEMENTS,
    Call,
    Eager,
    Offer,
    Stage,
    pieces,
    run_stages,
    whole_pieces,
)

_TIMINGS = 5
_LONGEST_REASON = 200
_INTEGERS = {2: torch.int16, 4: torch.int32}

# One thread compiles: no pool of workers is left behind. Loops take as many threads as torch has
# when they run, not as it had when they were compiled.
_OPTIONS = {"compile_threads": 1, "cpp.dynamic_threads": True}


def build(offer: Offer, rows: Tensor, eager: Eager) -> tuple[tuple[Stage, ...], str]:
    """Compiled stages, if they give the eager body's bits and are faster, and the reason.

    Args:
        offer: the program.
        rows: contiguous [n, width] with at least one whole piece.
        eager: the body that is right.

    Returns:
        The stages, none where the eager body has to go on, and why in one clause.
    """
    count = -(-PIECE_ELEMENTS // rows.shape[1])
    try:
        with _undisturbed():
            sample = rows[:count].clone()
            call = offer.call(sample)
            stages = _compiled(call, sample)
            for values in (sample, awkward_like(sample)):
                if not _agree(stages, offer.call(values), values, eager):
                    return (), "compiled code gives other bits than the eager body here"
            gain = _gain(stages, call, sample, eager)
    except Exception as error:  # noqa: BLE001  (whatever compilers do, the eager body is there)
        text = " ".join(str(error).split())[:_LONGEST_REASON]
        return (), f"it could not be compiled here: {type(error).__name__}: {text}"
    if gain <= 1.0:
        return (), f"compiled code took {1.0 / gain:.2f} times as long as the eager body here"
    return stages, f"compiled, {gain:.1f} times as fast as the eager body here"


@contextmanager
def _undisturbed() -> Iterator[None]:
    """What the caller set up for its own work does not reach into compiled code."""
    with (
        torch.inference_mode(False),
        torch.no_grad(),
        torch.autocast("cpu", enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _compiled(call: Call, sample: Tensor) -> tuple[Stage, ...]:
    """Compiled stages.

    torch.compile would guard what it returns with the state of the process, and compile again in
    inference mode or under autocast; the compiler behind it, given a traced graph, does not.
    """
    from torch import _inductor
    from torch.fx.experimental.proxy_tensor import make_fx

    x, *operands, out = (
        value.clone() for value in next(pieces(call, sample, torch.empty_like(sample)))
    )
    values: list[Tensor | int | torch.SymInt | None] = [x, *operands]
    values += [*call.program.scratch(x), out]
    return tuple(
        _inductor.compile(make_fx(stage)(*values), values, options=_OPTIONS)
        for stage in call.program.stages
    )


def awkward_like(sample: Tensor) -> Tensor:
    """Every bit pattern of 16-bit floats, shuffled; for float32 random patterns among them."""
    generator = torch.Generator().manual_seed(0)
    size, dtype = sample.numel(), sample.dtype
    short = torch.arange(size)[torch.randperm(size, generator=generator)].to(torch.int16)
    if dtype.itemsize == short.itemsize:
        return short.view(dtype).view(sample.shape)
    patterns = torch.randint(-(2**31), 2**31, (size,), generator=generator).to(torch.int32)
    values = torch.where(short % 2 == 0, short.view(torch.bfloat16).float(), patterns.view(dtype))
    return values.view(sample.shape)


def _agree(stages: tuple[Stage, ...], call: Call, values: Tensor, eager: Eager) -> bool:
    """Whether the bits are the same; one NaN is as good as another."""
    out = torch.empty_like(values)
    run_stages(stages, call, values, out)
    ours, truth = (result.view(-1)[: whole_pieces(values)] for result in (out, eager(values)))
    integer = _INTEGERS[truth.element_size()]
    same = (ours.view(integer) == truth.view(integer)) | (ours.isnan() & truth.isnan())
    return bool(same.all())


def _gain(stages: tuple[Stage, ...], call: Call, values: Tensor, eager: Eager) -> float:
    """The eager body's time over that of the stages: the best of a few each, by turns."""
    out = torch.empty_like(values)
    eager_seconds = compiled_seconds = math.inf
    for _ in range(_TIMINGS):
        started = time.perf_counter()
        eager(values)
        turned = time.perf_counter()
        run_stages(stages, call, values, out)
        eager_seconds = min(eager_seconds, turned - started)
        compiled_seconds = min(compiled_seconds, time.perf_counter() - turned)
    return eager_seconds / compiled_seconds
