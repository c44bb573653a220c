"""NVFP4: launches of the matrix products. Operands were checked by `autoq.kernels.nvfp4`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from autoq.kernels._jit import nvfp4_matmul as jit
from autoq.kernels._launch import nvfp4, split_k
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels._launch.nvfp4_tiles import tiles
from autoq.kernels._launch.nvfp4_variant import DECODE_ROWS, Kernel, Variant, variant
from autoq.kernels._launch.tiles import Tile, row_bucket, tuned
from autoq.kernels.targets import Target

__all__ = ["Kernel", "Variant", "linear", "matmul", "variant"]

_WEIGHT_BITS = 4
_SPLIT_BLOCK = 2048
_PARTS_OF_FLOAT32 = 3
_LARGEST_BLOCK_K = 256


@dataclass(frozen=True, slots=True)
class _Packed:
    """Codes [rows, K/2] and block scales [rows, K/16], contiguous, and the global scale."""

    codes: Tensor
    block_scale: Tensor
    global_scale: Tensor


@dataclass(frozen=True, slots=True)
class _Result:
    """Where sums go, and what is done to them on the way."""

    out: Tensor  # [m, n]
    a_scale: Tensor | None
    b_scale: Tensor
    bias: Tensor | None


def linear(
    x: Tensor,
    codes: Tensor,
    block_scale: Tensor,
    global_scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias; x is quantised too where it has a scale.

    Float32 x that is used as it is goes as three bfloat16 numbers, whose sum is exact.
    """
    (n, _), k = codes.shape, x.shape[-1]
    out = torch.empty(*x.shape[:-1], n, dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    m, weight = out.numel() // n, _packed(codes, block_scale, global_scale)
    result = _Result(out.view(m, n), input_scale, global_scale, _contiguous(bias))
    chosen, x = variant(target, m, n, k, input_scale is not None), x.reshape(m, k)
    if input_scale is None:
        _weight_only(x, weight, result, chosen, target, tile)
    elif chosen.kernel is Kernel.SCALED:
        a = _Packed(*nvfp4.quantize(x, input_scale, target=target), input_scale)
        _scaled(a, weight, result, chosen, target, tile)
    else:
        values = nvfp4.unscaled_values(x, input_scale, torch.bfloat16, target=target)
        _weight_only(values, weight, result, chosen, target, tile)
    return out


def matmul(
    a_codes: Tensor,
    a_block_scale: Tensor,
    a_global_scale: Tensor,
    b_codes: Tensor,
    b_block_scale: Tensor,
    b_global_scale: Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """a [..., K] @ b [N, K].T + bias."""
    n, k = len(b_codes), 2 * b_codes.shape[1]
    out = torch.empty(*a_codes.shape[:-1], n, dtype=out_dtype, device=a_codes.device)
    if not out.numel():
        return out
    m, b = out.numel() // n, _packed(b_codes, b_block_scale, b_global_scale)
    a_codes, a_block_scale = a_codes.reshape(m, k // 2), a_block_scale.reshape(m, k // 16)
    a = _packed(a_codes, a_block_scale, a_global_scale)
    result = _Result(out.view(m, n), a_global_scale, b_global_scale, _contiguous(bias))
    chosen = variant(target, m, n, k, True)
    if chosen.kernel is Kernel.SCALED:
        _scaled(a, b, result, chosen, target, tile)
    else:
        values = nvfp4.unscaled_dequantize(a.codes, a.block_scale, torch.bfloat16, target=target)
        _weight_only(values, b, result, chosen, target, tile)
    return out


def _scaled(
    a: _Packed, b: _Packed, result: _Result, chosen: Variant, target: Target, tile: Tile | None
) -> None:
    operands = (a.codes, a.block_scale, b.codes, b.block_scale)
    choices = _choices(tile, tiles(target, chosen, len(a.codes)), operands)
    _product(jit.scaled_kernel, operands, {"SWAP": chosen.swap}, choices, result)


def _weight_only(
    x: Tensor, weight: _Packed, result: _Result, chosen: Variant, target: Target, tile: Tile | None
) -> None:
    if x.dtype == torch.float32:
        x = _split_float32(x)
    words = nvfp4.as_words(x, torch.int32)
    operands = (words, weight.codes, weight.block_scale.view(torch.uint8))
    choices = _choices(tile, tiles(target, chosen, len(x)), operands)
    constants = {
        "FLOAT16": x.dtype == torch.float16,
        "ASSEMBLY": target.backend == "cuda",
        "HARDWARE": target.fp8_type,
        "SWAP": chosen.swap,
    }
    _product(jit.weight_only_kernel, operands, constants, choices, result)


def _product(
    kernel: Any,
    operands: tuple[Tensor, ...],
    constants: Mapping[str, bool],
    choices: Sequence[Tile],
    result: _Result,
) -> None:
    """Launch a kernel, and add what it leaves to be added.

    The left operand has m rows, or a multiple of them: parts of it that are summed as well.
    """
    (m, n), rows, blocks = result.out.shape, len(operands[0]), operands[-1].shape[1]
    parts = choices[0].split_k * (rows // m)
    is_whole = parts == 1
    sums = result.out if is_whole else split_k.partial_sums(parts, m, n, result.out)
    launched, options = tuned(kernel, choices, sums)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(rows, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    k = 16 * blocks
    with on_device_of(sums):
        launched[grid](
            *operands,
            sums,
            *((result.a_scale, result.b_scale, result.bias) if is_whole else (None, None, None)),
            rows,
            n,
            k,
            blocks,
            row_bucket(rows),
            K_MULTIPLE=min(_LARGEST_BLOCK_K, k & -k) or _LARGEST_BLOCK_K,
            **constants,
            **options,
        )
    if not is_whole:
        scales = {"row_scale": result.a_scale, "column_scale": result.b_scale}
        split_k.reduce(sums, result.out, **scales, bias=result.bias)


def _choices(
    tile: Tile | None, listed: Sequence[Tile], operands: tuple[Tensor, ...]
) -> Sequence[Tile]:
    """The tiles with K cut as the first of them wants it, so that all need the same room."""
    if tile is not None:
        return (tile,)
    rows, n, k = len(operands[0]), len(operands[-1]), 16 * operands[-1].shape[1]
    if rows > DECODE_ROWS:
        return listed
    first = listed[0]
    parts = split_k.parts(
        rows, n, k, block_m=first.block_m, block_n=first.block_n, weight_bits=_WEIGHT_BITS
    )
    return [replace(one, split_k=parts) for one in listed]


def _split_float32(x: Tensor) -> Tensor:
    """bfloat16 [3 * m, k], the parts of x below each other."""
    m, k = x.shape
    parts = torch.empty(_PARTS_OF_FLOAT32 * m, k, dtype=torch.bfloat16, device=x.device)
    if not k:
        return parts
    with on_device_of(x):
        jit.split_float32_kernel[(blocks_of(x.numel(), _SPLIT_BLOCK),)](
            x.contiguous(), parts, x.numel(), BLOCK=_SPLIT_BLOCK, num_warps=4
        )
    return parts


def _packed(codes: Tensor, block_scale: Tensor, global_scale: Tensor) -> _Packed:
    return _Packed(codes.contiguous(), block_scale.contiguous(), global_scale)


def _contiguous(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.detach().contiguous()
