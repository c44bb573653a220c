"""FP8 E4M3: launches of the matrix products, and which kernel takes which."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from triton.tools.tensor_descriptor import TensorDescriptor

from autoq.kernels._jit import fp8_matmul as jit
from autoq.kernels._launch import fp8_tiles
from autoq.kernels._launch.device import blocks_of, multiprocessors_of, on_device_of
from autoq.kernels._launch.split_k import partial_sums, parts, reduce, scale_stride
from autoq.kernels._launch.tiles import Tile, row_bucket, tiles_of, tuned
from autoq.kernels._scaling import BLOCK, FP8Tensor, Scaling
from autoq.kernels.targets import Target

MOST_DECODE_ROWS = 64
_ALIGNMENT_BYTES = 16
"""Of rows, for vector loads and tensor descriptors."""
_FASTER_WITH_UNIT_SCALES = (120, 121)
"""Where matrix units have a half-rate instruction for E4M3, and a full-rate one with MX scales.

Published for an RTX 5090: 1.55 times as fast (triton-lang/triton #11320)."""
_FEWEST_PERSISTENT_TILES = 132
_LARGEST_K_MULTIPLE = 256


class Kernel(StrEnum):
    """How a product is computed."""

    DECODE = "decode"
    """Small tiles and K cut into parts, so that the whole GPU reads the weight."""
    TILED = "tiled"
    """A program computes one tile, and reads operands through pointers."""
    PERSISTENT = "persistent"
    """A program computes tile after tile, moved by tensor descriptors."""


@dataclass(frozen=True, slots=True)
class Variant:
    """What computes a product, and why."""

    kernel: Kernel
    tiles: tuple[Tile, ...]
    """To choose from by measuring; all cut K into as many parts."""
    reason: str


def variant(
    target: Target, m: int, n: int, k: int, *, scaling: Scaling, out_dtype: torch.dtype
) -> Variant:
    """The kernel for [m, k] @ [n, k].T on `target`; `scaling` is that of the right operand."""
    lists = fp8_tiles.IN_BLOCKS if scaling.in_blocks else fp8_tiles.SCALED
    if m <= MOST_DECODE_ROWS:
        return _decode_variant(tiles_of(lists.decode, target), m, n, k)
    tiled = tuple(tiles_of(lists.tiled, target))
    if not k:
        return Variant(Kernel.TILED, tiled, "nothing is summed, and descriptors must not be empty")
    if not target.bulk_copy:
        return Variant(Kernel.TILED, tiled, f"{target.name} has no tensor descriptors")
    if n * out_dtype.itemsize % _ALIGNMENT_BYTES:
        return Variant(Kernel.TILED, tiled, f"rows of {n} results cannot be stored in bulk")
    if scaling is Scaling.BLOCK_1X128:
        return Variant(Kernel.TILED, tiled, "each row of the right operand has its own scales")
    count = blocks_of(m, 128) * blocks_of(n, 128)
    if count < _FEWEST_PERSISTENT_TILES:
        return Variant(Kernel.TILED, tiled, f"{count} tiles do not occupy a GPU twice")
    persistent = tuple(tiles_of(lists.persistent, target))
    return Variant(Kernel.PERSISTENT, persistent, f"{count} tiles of 128 x 128")


def _decode_variant(tiles: Sequence[Tile], m: int, n: int, k: int) -> Variant:
    block_m = row_bucket(m)
    split_k = parts(m, n, k, block_m=block_m, block_n=tiles[0].block_n)
    return Variant(
        Kernel.DECODE,
        tuple(replace(tile, block_m=block_m, split_k=split_k) for tile in tiles),
        f"{m} rows; K in {split_k} parts",
    )


def matmul(
    a: FP8Tensor,
    b: FP8Tensor,
    bias: Tensor | None,
    out_dtype: torch.dtype,
    *,
    target: Target,
    chosen: Variant | None = None,
) -> Tensor:
    """a [..., K] @ b [N, K].T + bias.

    Args:
        chosen: to be taken instead of what `variant` says.
    """
    n, k = b.codes.shape
    out = torch.empty(*a.codes.shape[:-1], n, dtype=out_dtype, device=a.codes.device)
    if not out.numel():
        return out
    rows = out.view(-1, n)
    if chosen is None:
        chosen = variant(target, len(rows), n, k, scaling=b.scaling, out_dtype=out_dtype)
    bias = None if bias is None else bias.detach().contiguous()
    product = _Product(
        a=_aligned(a.codes.reshape(len(rows), k), target),
        b=_aligned(b.codes, target),
        a_scale=a.scale.contiguous(),
        b_scale=b.scale.contiguous(),
        bias=bias,
        scaling=b.scaling,
        out=rows,
        unit_scales=target.architecture in _FASTER_WITH_UNIT_SCALES,
    )
    with on_device_of(out):
        if chosen.kernel is Kernel.PERSISTENT:
            _launch_persistent(product, chosen.tiles)
        elif chosen.tiles[0].split_k > 1:
            _launch_parts(product, chosen.tiles)
        else:
            _launch_tiled(product, chosen.tiles)
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class _Product:
    """A product as the kernels take it."""

    a: Tensor
    b: Tensor
    a_scale: Tensor | None
    b_scale: Tensor | None
    bias: Tensor | None
    scaling: Scaling  # of b
    out: Tensor  # [m, n], or [parts, m, n]
    unit_scales: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """m, n, k, and m rounded up for the autotuner."""
        m, n = self.out.shape[-2:]
        return m, n, self.a.shape[1], row_bucket(m)

    @property
    def scale_arguments(self) -> dict[str, int]:
        """What the kernels must know of the scales."""
        if self.scaling.in_blocks:
            rows = BLOCK if self.scaling is Scaling.BLOCK_128X128 else 1
            return {"ROWS_PER_SCALE": rows, "UNIT_SCALES": self.unit_scales}
        return {
            "row_scale_stride": scale_stride(self.a_scale),
            "column_scale_stride": scale_stride(self.b_scale),
            "UNIT_SCALES": self.unit_scales,
        }


def _aligned(codes: Tensor, target: Target) -> Tensor:
    """Contiguous codes in aligned rows, zeros added where K is no multiple of 16.

    Bytes where the target has no E4M3 type.
    """
    codes = codes.view(torch.uint8)
    missing = -codes.shape[1] % _ALIGNMENT_BYTES
    codes = functional.pad(codes, (0, missing)) if missing else codes.contiguous()
    if codes.data_ptr() % _ALIGNMENT_BYTES:
        codes = codes.clone()
    return codes.view(torch.float8_e4m3fn) if target.fp8_matmul else codes


def _launch_parts(product: _Product, tiles: Sequence[Tile]) -> None:
    """Sum parts of K on their own, then add them; scales that all of K shares come last."""
    m, n, _, _ = product.sizes
    partial = partial_sums(tiles[0].split_k, m, n, product.out)
    if product.scaling.in_blocks:
        _launch_tiled(replace(product, out=partial, bias=None), tiles)
        reduce(partial, product.out, bias=product.bias)
        return
    _launch_tiled(replace(product, out=partial, bias=None, a_scale=None, b_scale=None), tiles)
    reduce(
        partial,
        product.out,
        row_scale=product.a_scale,
        column_scale=product.b_scale,
        bias=product.bias,
    )


def _launch_tiled(product: _Product, tiles: Sequence[Tile]) -> None:
    m, n, k, m_bucket = product.sizes
    stock = jit.block_scaled_kernel if product.scaling.in_blocks else jit.scaled_kernel
    kernel, tile = tuned(stock, tiles, product.a)

    def grid(meta: Mapping[str, int]) -> tuple[int, int]:
        return blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"]), meta["SPLIT_K"]

    kernel[grid](
        product.a,
        product.b,
        product.out,
        product.a_scale,
        product.b_scale,
        product.bias,
        m,
        n,
        k,
        m_bucket,
        **product.scale_arguments,
        **tile,
        K_MULTIPLE=min(k & -k, _LARGEST_K_MULTIPLE) if k else _LARGEST_K_MULTIPLE,
        NATIVE=product.a.dtype is torch.float8_e4m3fn,
    )


def _launch_persistent(product: _Product, tiles: Sequence[Tile]) -> None:
    m, n, k, m_bucket = product.sizes
    in_blocks = product.scaling.in_blocks
    stock = jit.persistent_block_scaled_kernel if in_blocks else jit.persistent_kernel
    kernel, tile = tuned(
        stock,
        tiles,
        product.a,
        before_launch=_shape_descriptors,
        apart=(product.a.dtype, product.out.dtype),
    )
    operands = {
        "a_descriptor": TensorDescriptor.from_tensor(product.a, [1, 1]),
        "b_descriptor": TensorDescriptor.from_tensor(product.b, [1, 1]),
        "out_descriptor": TensorDescriptor.from_tensor(product.out, [1, 1]),
    }
    _shape_descriptors({**operands, **tiles[0].constants})
    multiprocessors = multiprocessors_of(product.out)

    def grid(meta: Mapping[str, int]) -> tuple[int]:
        count = blocks_of(m, meta["BLOCK_M"]) * blocks_of(n, meta["BLOCK_N"])
        # Two programs share a multiprocessor where their tiles are small.
        programs = multiprocessors * (2 if meta["BLOCK_M"] * meta["BLOCK_N"] <= 8192 else 1)
        return (min(count, programs),)

    kernel[grid](
        *operands.values(),
        product.a_scale,
        product.b_scale,
        product.bias,
        m,
        n,
        k,
        m_bucket,
        **product.scale_arguments,
        **tile,
    )


def _shape_descriptors(arguments: Mapping[str, Any]) -> None:
    """Give the descriptors among the arguments of a persistent kernel the blocks of its tile."""
    block_m, block_n, block_k = (arguments[f"BLOCK_{side}"] for side in "MNK")
    arguments["a_descriptor"].block_shape = [block_m, block_k]
    arguments["b_descriptor"].block_shape = [block_n, block_k]
    arguments["out_descriptor"].block_shape = [block_m, block_n // 2]
