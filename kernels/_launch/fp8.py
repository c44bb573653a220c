"""FP8 E4M3: launches of the element-wise kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.kernels._jit import fp8 as jit
from autoq.kernels._launch.device import blocks_of, on_device_of, rounds_to_e4m3
from autoq.kernels._scaling import BLOCK, Scaling
from autoq.kernels.targets import Target

_ELEMENTS = 4096
"""Of a program: 16 for each of 256 threads, which are 16 bytes of codes."""
_LONGEST_ROW = 16384
"""Columns that one program holds in registers."""
_MOST_PARTIAL_MAXIMA = 1024


def scales(x: Tensor, scaling: Scaling, *, target: Target) -> Tensor:
    """Scales of `x` in the shape of `scaling`."""
    shape = scaling.scale_shape(x.shape)
    if not x.numel():
        return torch.ones(shape, dtype=torch.float32, device=x.device)
    x = x.contiguous()
    scale = torch.empty(shape, dtype=torch.float32, device=x.device)
    if scaling is Scaling.TENSOR:
        _launch_tensor_scale(x, scale)
    else:
        _launch(x, None, None, scale, scaling, fake=False, target=target)
    return scale


def quantize(
    x: Tensor, scale: Tensor | None, scaling: Scaling, *, target: Target
) -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn, scale) of `x`; scales are computed where none are given."""
    codes = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    if scale is None and (scaling is Scaling.TENSOR or not x.numel()):
        scale = scales(x, scaling, target=target)
    if scale is not None:
        _launch(x, codes, scale, None, scaling, fake=False, target=target)
        return codes, scale
    scale = torch.empty(scaling.scale_shape(x.shape), dtype=torch.float32, device=x.device)
    _launch(x, codes, None, scale, scaling, fake=False, target=target)
    return codes, scale


def fake_quantize(x: Tensor, scale: Tensor | None, scaling: Scaling, *, target: Target) -> Tensor:
    """What `quantize` leaves of `x`, in its dtype."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if scale is None and scaling is Scaling.TENSOR:
        scale = scales(x, scaling, target=target)
    _launch(x, out, scale, None, scaling, fake=True, target=target)
    return out


def dequantize(
    codes: Tensor, scale: Tensor, scaling: Scaling, dtype: torch.dtype, *, target: Target
) -> Tensor:
    """Values codes * scale."""
    out = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    if not codes.numel():
        return out
    groups = _groups_of(codes.shape, scaling)
    with on_device_of(codes):
        jit.dequantize_kernel[(groups.programs,)](
            codes.contiguous().view(torch.uint8),
            scale.contiguous(),
            out,
            groups.columns,
            groups.blocks,
            groups.count,
            *groups.scale_strides,
            ROWS_PER_SCALE=groups.rows_per_scale,
            BLOCK=groups.block,
            GROUPS=groups.per_program,
            HARDWARE=target.fp8_type,
            num_warps=groups.warps,
        )
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Groups:
    """A tensor as the kernels see it."""

    columns: int
    block: int  # columns of a group, the last of a row aside
    blocks: int  # groups in a row
    count: int  # groups in all
    scale_strides: tuple[int, int]  # from row to row, from block to block of the scales
    rows_per_scale: int = 1

    @property
    def per_program(self) -> int:
        return max(1, _ELEMENTS // self.block)

    @property
    def programs(self) -> int:
        return blocks_of(self.count, self.per_program)

    @property
    def warps(self) -> int:
        return 8 if self.block <= _ELEMENTS else 16


def _groups_of(shape: torch.Size, scaling: Scaling, *, whole_rows: bool = False) -> _Groups:
    """The groups of a tensor that is not empty; with `whole_rows` no row is cut into several."""
    size, columns, strides = shape.numel(), shape[-1], (0, 0)
    if scaling is Scaling.TENSOR:
        block, columns = _ELEMENTS, size
    elif scaling is Scaling.ROW:
        longest = _LONGEST_ROW if whole_rows else _ELEMENTS
        block, strides = min(longest, _power_of_two(columns)), (1, 0)
    elif scaling is Scaling.BLOCK_1X128 and columns % BLOCK == 0:
        # Blocks are rows of a narrower tensor.
        block, columns, strides = BLOCK, BLOCK, (1, 0)
    else:
        block, strides = BLOCK, (blocks_of(columns, BLOCK), 1)
    blocks = blocks_of(columns, block)
    return _Groups(
        columns=columns,
        block=block,
        blocks=blocks,
        count=size // columns * blocks,
        scale_strides=strides,
        rows_per_scale=BLOCK if scaling is Scaling.BLOCK_128X128 else 1,
    )


def _power_of_two(size: int) -> int:
    return max(16, 1 << (size - 1).bit_length())


def _launch(
    x: Tensor,
    out: Tensor | None,
    given_scale: Tensor | None,
    scale: Tensor | None,
    scaling: Scaling,
    *,
    fake: bool,
    target: Target,
) -> None:
    """Quantise `x` to `out` (codes, or values with `fake`), or store its scales only."""
    if not x.numel():
        return
    x = x.contiguous()
    if out is not None and not fake:
        out = out.view(torch.uint8)
    hardware = rounds_to_e4m3(target)
    with on_device_of(x):
        if given_scale is None and scaling is Scaling.BLOCK_128X128:
            _launch_squares(x, out, scale, fake=fake, hardware=hardware)
        elif given_scale is None and scaling is Scaling.ROW and x.shape[-1] > _LONGEST_ROW:
            _launch_long_rows(x, out, scale, fake=fake, hardware=hardware)
        else:
            _launch_groups(x, out, given_scale, scale, scaling, fake=fake, hardware=hardware)


def _launch_groups(
    x: Tensor,
    out: Tensor | None,
    given_scale: Tensor | None,
    scale: Tensor | None,
    scaling: Scaling,
    *,
    fake: bool,
    hardware: bool,
) -> None:
    groups = _groups_of(x.shape, scaling, whole_rows=given_scale is None)
    jit.quantize_groups_kernel[(groups.programs,)](
        x,
        out,
        None if given_scale is None else given_scale.contiguous(),
        scale,
        groups.columns,
        groups.blocks,
        groups.count,
        *groups.scale_strides,
        ROWS_PER_SCALE=groups.rows_per_scale,
        BLOCK=groups.block,
        GROUPS=groups.per_program,
        FAKE=fake,
        HARDWARE=hardware,
        num_warps=groups.warps,
    )


def _launch_long_rows(
    x: Tensor, out: Tensor | None, scale: Tensor | None, *, fake: bool, hardware: bool
) -> None:
    columns = x.shape[-1]
    jit.quantize_long_rows_kernel[(x.numel() // columns,)](
        x, out, scale, columns, BLOCK=8192, FAKE=fake, HARDWARE=hardware, num_warps=16
    )


def _launch_squares(
    x: Tensor, out: Tensor | None, scale: Tensor | None, *, fake: bool, hardware: bool
) -> None:
    rows, columns = x.shape
    jit.quantize_squares_kernel[(blocks_of(rows, BLOCK) * blocks_of(columns, BLOCK),)](
        x, out, scale, rows, columns, SIDE=BLOCK, FAKE=fake, HARDWARE=hardware, num_warps=16
    )


def _launch_tensor_scale(x: Tensor, scale: Tensor) -> None:
    programs = min(_MOST_PARTIAL_MAXIMA, blocks_of(x.numel(), _ELEMENTS))
    amax = torch.empty(programs, dtype=torch.float32, device=x.device)
    with on_device_of(x):
        jit.partial_amax_kernel[(programs,)](x, amax, x.numel(), BLOCK=_ELEMENTS, num_warps=8)
        jit.tensor_scale_kernel[(1,)](
            amax, scale, programs, BLOCK=_MOST_PARTIAL_MAXIMA, num_warps=4
        )
