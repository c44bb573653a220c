"""MXFP8 and MXFP4: launches of the matrix products. Operands were checked by the contracts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
from torch import Tensor

from autoq.kernels._jit import mx_matmul as jit
from autoq.kernels._launch import mx, split_k
from autoq.kernels._launch.device import blocks_of, on_device_of
from autoq.kernels._launch.mx_tiles import tiles
from autoq.kernels._launch.mx_variant import DECODE_ROWS, Kernel, Variant, variant
from autoq.kernels._launch.nvfp4 import as_words
from autoq.kernels._launch.tiles import Tile, row_bucket, tuned
from autoq.kernels._mx import BLOCK, E2M1, Element, MXTensor, ScaleRule
from autoq.kernels.targets import Target

_LARGEST_BLOCK_K = 256


@dataclass(frozen=True, slots=True)
class _Product:
    """What every kernel is launched with, besides its left operand."""

    weight: MXTensor
    bias: Tensor | None
    out: Tensor  # [m, n]
    chosen: Variant
    target: Target
    tiles: Sequence[Tile]


def linear(
    x: Tensor,
    weight: MXTensor,
    bias: Tensor | None,
    inputs: Element | None,
    rule: ScaleRule,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """x [..., K] @ weight [N, K].T + bias, x quantised to `inputs` by `rule`.

    Where `inputs` is None, x is bfloat16 or float16 and used as it is.
    """
    out = torch.empty(*x.shape[:-1], weight.shape[0], dtype=out_dtype, device=x.device)
    if not out.numel():
        return out
    product = _product(out, inputs, weight, bias, target, tile)
    x = x.reshape(len(product.out), -1)
    if inputs is None:
        _upcast(x, product)
    elif product.chosen.kernel is Kernel.UPCAST:
        _upcast(mx.fake_quantize(x, inputs, rule, torch.bfloat16, target=target), product)
    else:
        _packed(MXTensor(*mx.quantize(x, inputs, rule, target=target)), product)
    return out


def matmul(
    a: MXTensor,
    b: MXTensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    tile: Tile | None = None,
) -> Tensor:
    """a [..., K] @ b [N, K].T + bias."""
    *leading, k = a.shape
    out = torch.empty(*leading, b.shape[0], dtype=out_dtype, device=a.codes.device)
    if not out.numel():
        return out
    product = _product(out, a.element, b, bias, target, tile)
    m = len(product.out)
    left = MXTensor(a.codes.reshape(m, -1), a.block_scale.reshape(m, k // BLOCK))
    if product.chosen.kernel is Kernel.UPCAST:
        _upcast(mx.dequantize(left, torch.bfloat16, target=target), product)
    else:
        _packed(left, product)
    return out


def _product(
    out: Tensor,
    a: Element | None,
    weight: MXTensor,
    bias: Tensor | None,
    target: Target,
    tile: Tile | None,
) -> _Product:
    n, k = weight.shape
    matrix = out.view(-1, n)
    chosen = variant(target, len(matrix), n, k, a, weight.element)
    return _Product(
        weight=MXTensor(weight.codes.contiguous(), weight.block_scale.contiguous()),
        bias=None if bias is None else bias.detach().contiguous(),
        out=matrix,
        chosen=chosen,
        target=target,
        tiles=(tile,) if tile else _cut(tiles(target, chosen, len(matrix)), len(matrix), weight),
    )


def _cut(listed: Sequence[Tile], m: int, weight: MXTensor) -> Sequence[Tile]:
    """The tiles with K cut as the first of them wants it, so that all need the same room."""
    if m > DECODE_ROWS:
        return listed
    (n, k), first = weight.shape, listed[0]
    bits = 8 // weight.element.codes_per_byte
    parts = split_k.parts(m, n, k, block_m=first.block_m, block_n=first.block_n, weight_bits=bits)
    return [replace(tile, split_k=parts) for tile in listed]


def _packed(a: MXTensor, product: _Product) -> None:
    """By kernels that take codes on both sides."""
    chosen, weight = product.chosen, product.weight
    constants = {"B_E2M1": weight.element is E2M1}
    kernel = jit.grouped_kernel
    if chosen.kernel is Kernel.SCALED:
        kernel = jit.scaled_kernel
        constants |= {"A_E2M1": a.element is E2M1, "WIDEN": chosen.widen, "SWAP": chosen.swap}
    operands = (
        a.codes.contiguous(),
        a.block_scale.contiguous(),
        weight.codes,
        weight.block_scale,
    )
    _launch(kernel, operands, constants, product)


def _upcast(x: Tensor, product: _Product) -> None:
    """By the kernel that takes values on the left; E2M1 wants them as words of two."""
    weight, is_e2m1 = product.weight, product.weight.element is E2M1
    constants = {
        "B_E2M1": is_e2m1,
        "FLOAT16": x.dtype == torch.float16,
        # The interpreter runs no assembly. There, as on AMD, integers do the same.
        "ASSEMBLY": product.target.backend == "cuda" and not triton.knobs.runtime.interpret,
        "HARDWARE": product.target.fp8_type,
    }
    operands = (
        as_words(x, torch.int32) if is_e2m1 else x.contiguous(),
        weight.codes.view(torch.uint8),
        weight.block_scale,
    )
    _launch(jit.upcast_kernel, operands, constants, product)


def _launch(
    kernel: Any, operands: tuple[Tensor, ...], constants: Mapping[str, bool], product: _Product
) -> None:
    """Launch a kernel, and add the parts that it leaves."""
    (m, n), k = product.out.shape, product.weight.shape[1]
    parts = product.tiles[0].split_k
    whole = parts == 1
    sums = product.out if whole else split_k.partial_sums(parts, m, n, product.out)
    launched, options = tuned(kernel, product.tiles, sums)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    with on_device_of(sums):
        launched[grid](
            *operands,
            product.bias if whole else None,
            sums,
            m,
            n,
            k,
            k // BLOCK,
            row_bucket(m),
            K_MULTIPLE=min(_LARGEST_BLOCK_K, k & -k) or _LARGEST_BLOCK_K,
            **constants,
            **options,
        )
    if not whole:
        split_k.reduce(sums, product.out, bias=product.bias)
