"""Products with INT4 weights: launches of the fused kernel, for 16-bit and for E4M3 inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.kernels._jit import int4_matmul as jit
from autoq.kernels._launch.device import blocks_of, on_device_of, rounds_to_e4m3
from autoq.kernels._launch.int4_tiles import tiles
from autoq.kernels._launch.int4_variant import DECODE_ROWS, Product
from autoq.kernels._launch.split_k import partial_sums, reduce, scale_stride
from autoq.kernels._launch.tiles import Tile, row_bucket, tuned
from autoq.kernels.targets import Target

_ALIGNMENT_BYTES = 16
_NARROWEST_E4M3, _NARROWEST_16_BIT = 32, 16
"""Columns of the narrowest dot that triton compiles."""


def matmul(
    x: Tensor,
    codes: Tensor,
    group_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    row_scale: Tensor | None = None,
    tensor_scale: Tensor | None = None,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K].T * row_scale + bias.

    Args:
        x: bfloat16 or float16; or E4M3 codes, whose `row_scale` is float32, of one element or one
            for each row.
        codes: uint8 [N, K/2] by halves of groups of 32, 64 or a multiple of 128 columns.
        group_scale: float32 [N, groups].
        bias: [N].
        tensor_scale: float32 scalar of a weight in two levels; its `x` are E4M3 codes.
        tile: the one to take, instead of choosing.
    """
    n, k = len(codes), 2 * codes.shape[1]
    out = torch.empty(*x.shape[:-1], n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    product = _product(x, tensor_scale)
    operands = _Operands(
        x=_operand(x.reshape(-1, k), target),
        codes=_aligned(codes),
        group_scale=group_scale.contiguous(),
        tensor_scale=tensor_scale,
        row_scale=None if row_scale is None else row_scale.contiguous(),
        bias=None if bias is None else bias.detach().contiguous(),
    )
    m = len(operands.x)
    choices = (tile,) if tile else tiles(target, product, m, n, k)
    split_k = choices[0].split_k
    with on_device_of(out):
        if split_k == 1:
            _launch(operands, out.view(m, n), choices, target)
        else:
            sums = partial_sums(split_k, m, n, like=out)
            _launch(operands, sums, choices, target)
            reduce(
                sums,
                out.view(m, n),
                row_scale=operands.row_scale,
                column_scale=tensor_scale,
                bias=operands.bias,
            )
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operands:
    """A product as the kernel takes it: contiguous matrices."""

    x: Tensor
    codes: Tensor
    group_scale: Tensor
    tensor_scale: Tensor | None
    row_scale: Tensor | None
    bias: Tensor | None


def _launch(operands: _Operands, out: Tensor, choices: Sequence[Tile], target: Target) -> None:
    """With K in parts `out` takes their sums, and scales and bias are for later."""
    (m, k), n = operands.x.shape, len(operands.codes)
    groups = operands.group_scale.shape[1]
    whole, two_level = choices[0].split_k == 1, operands.tensor_scale is not None
    native = operands.x.dtype == torch.float8_e4m3fn
    kernel, options = tuned(jit.matmul_kernel, choices, out)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    kernel[grid](
        operands.x,
        operands.codes,
        operands.group_scale,
        operands.tensor_scale,
        out,
        operands.row_scale if whole else None,
        operands.bias if whole else None,
        m,
        n,
        k,
        k // 2,
        groups,
        scale_stride(operands.row_scale),
        row_bucket(m),
        GROUP=k // groups,
        NARROWEST=_NARROWEST_E4M3 if native else _NARROWEST_16_BIT,
        PTX=target.backend == "cuda" and (native or not two_level),
        HARDWARE=rounds_to_e4m3(target),
        ONE_SUM=two_level and m > DECODE_ROWS,
        **options,
    )


def _product(x: Tensor, tensor_scale: Tensor | None) -> Product:
    if tensor_scale is not None:
        return Product.TWO_LEVEL
    return Product.W4A8 if x.dtype == torch.float8_e4m3fn else Product.W4A16


def _operand(x: Tensor, target: Target) -> Tensor:
    """E4M3 codes as float16, exactly, where matrix units do not take them."""
    if x.dtype == torch.float8_e4m3fn and not target.fp8_matmul:
        x = x.to(torch.float16)
    return _aligned(x)


def _aligned(matrix: Tensor) -> Tensor:
    """Contiguous, from an address for vector loads on.

    Without them triton lays codes out so that four neighbours need not belong to one row, and they
    are unpacked four at a time with the table of one.
    """
    matrix = matrix.contiguous()
    return matrix.clone() if matrix.data_ptr() % _ALIGNMENT_BYTES else matrix
