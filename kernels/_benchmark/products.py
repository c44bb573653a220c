"""Matrix products of every family, beside torch's in bfloat16 and cuBLASLt's in FP8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from autoq.kernels import fp8, int4, int8, mxfp4, mxfp8, nvfp4, w4a8
from autoq.kernels._benchmark import goals
from autoq.kernels._benchmark.case import Case, Prepared, Work

DTYPE = torch.bfloat16

_Made = tuple[Work, int]
"""The product to time, and the bytes of its operands."""

Make = Callable[[Tensor, Tensor], _Made]
"""Of x [M, K] and a weight [N, K]."""


def _fp8_linear(scaling: fp8.Scaling, static: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = fp8.quantize(weight, scaling=scaling)
    scale = fp8.scales(x, fp8.Scaling.TENSOR) if static else None
    return partial(fp8.linear, x, packed, input_scale=scale), packed.nbytes + x.nbytes


def _fp8_matmul(x_scaling: fp8.Scaling, scaling: fp8.Scaling, x: Tensor, weight: Tensor) -> _Made:
    a, b = fp8.quantize(x, scaling=x_scaling), fp8.quantize(weight, scaling=scaling)
    return partial(fp8.matmul, a, b, out_dtype=DTYPE), a.nbytes + b.nbytes


def _nvfp4_linear(quantize_input: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = nvfp4.quantize(weight)
    scale = nvfp4.global_scale(x.abs().amax()) if quantize_input else None
    return partial(nvfp4.linear, x, packed, input_scale=scale), packed.nbytes + x.nbytes


def _nvfp4_matmul(x: Tensor, weight: Tensor) -> _Made:
    a, b = nvfp4.quantize(x), nvfp4.quantize(weight)
    return partial(nvfp4.matmul, a, b, out_dtype=DTYPE), a.nbytes + b.nbytes


def _int4_linear(x: Tensor, weight: Tensor) -> _Made:
    packed = int4.quantize(weight)
    return partial(int4.linear, x, packed), packed.nbytes + x.nbytes


def _w4a8_linear(static: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = w4a8.quantize(weight)
    scale = fp8.scales(x, fp8.Scaling.TENSOR) if static else None
    return partial(w4a8.linear, x, packed, input_scale=scale), packed.nbytes + x.nbytes


def _int8_linear(quantize_input: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = int8.quantize(weight)
    product = partial(int8.linear, x, packed, quantize_input=quantize_input)
    return product, packed.nbytes + x.nbytes


def _int8_matmul(x: Tensor, weight: Tensor) -> _Made:
    a, b = int8.quantize(x), int8.quantize(weight)
    return partial(int8.matmul, a, b, out_dtype=DTYPE), a.nbytes + b.nbytes


def _mxfp8_linear(quantize_input: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = mxfp8.quantize(weight)
    return partial(mxfp8.linear, x, packed, quantize_input=quantize_input), packed.nbytes + x.nbytes


def _mxfp4_linear(quantize_input: bool, x: Tensor, weight: Tensor) -> _Made:
    packed = mxfp4.quantize(weight)
    return partial(mxfp4.linear, x, packed, quantize_input=quantize_input), packed.nbytes + x.nbytes


def _mxfp4_linear_in_mxfp4(x: Tensor, weight: Tensor) -> _Made:
    packed = mxfp4.quantize(weight)
    product = partial(mxfp4.linear, x, packed, input_type=mxfp4.MXFP4Tensor)
    return product, packed.nbytes + x.nbytes


_TENSOR, _ROW = fp8.Scaling.TENSOR, fp8.Scaling.ROW
_BLOCK, _SQUARE = fp8.Scaling.BLOCK_1X128, fp8.Scaling.BLOCK_128X128


@dataclass(frozen=True, slots=True)
class _Product:
    operation: str
    variant: str
    make: Make


PRODUCTS = (
    _Product("fp8.matmul", "row", partial(_fp8_matmul, _ROW, _ROW)),
    _Product("fp8.matmul", "128x128", partial(_fp8_matmul, _BLOCK, _SQUARE)),
    _Product("fp8.linear", "input scale given", partial(_fp8_linear, _ROW, True)),
    _Product("fp8.linear", "input by row", partial(_fp8_linear, _ROW, False)),
    _Product("fp8.linear", "128x128", partial(_fp8_linear, _SQUARE, False)),
    _Product("nvfp4.matmul", "packed", _nvfp4_matmul),
    _Product("nvfp4.linear", "input as it is", partial(_nvfp4_linear, False)),
    _Product("nvfp4.linear", "input quantised", partial(_nvfp4_linear, True)),
    _Product("int4.linear", "input as it is", _int4_linear),
    _Product("w4a8.linear", "input scale given", partial(_w4a8_linear, True)),
    _Product("w4a8.linear", "input by row", partial(_w4a8_linear, False)),
    _Product("int8.matmul", "packed", _int8_matmul),
    _Product("int8.linear", "input as it is", partial(_int8_linear, False)),
    _Product("int8.linear", "input by row", partial(_int8_linear, True)),
    _Product("mxfp8.linear", "input as it is", partial(_mxfp8_linear, False)),
    _Product("mxfp8.linear", "input quantised", partial(_mxfp8_linear, True)),
    _Product("mxfp4.linear", "input as it is", partial(_mxfp4_linear, False)),
    _Product("mxfp4.linear", "input quantised", partial(_mxfp4_linear, True)),
    _Product("mxfp4.linear", "input in mxfp4", _mxfp4_linear_in_mxfp4),
)


def cases(m: int, n: int, k: int) -> Iterator[Case]:
    """Every product of a bfloat16 input [m, k] with a weight [n, k]."""
    for product in PRODUCTS:
        yield Case(
            operation=product.operation,
            variant=product.variant,
            shape={"m": m, "n": n, "k": k},
            dtype=DTYPE,
            prepare=partial(_prepare, product.make, m, n, k),
            goals=goals.of_product(product.operation, product.variant, m, n, k),
        )


def _prepare(make: Make, m: int, n: int, k: int, device: torch.device) -> Prepared:
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (
        torch.randn(rows, k, device=device, generator=generator).to(DTYPE) for rows in (m, n)
    )
    ours, operand_bytes = make(x, weight)
    baselines: dict[str, Work] = {"bf16": partial(functional.linear, x, weight)}
    if device.type == "cuda":
        baselines["scaled_mm_fp8"] = scaled_mm(x, weight)
    moved = operand_bytes + m * n * DTYPE.itemsize
    return Prepared(ours, baselines, logical_bytes=moved, operations=2 * m * n * k)


def scaled_mm(x: Tensor, weight: Tensor) -> Work:
    """torch's own FP8 product (cuBLASLt on NVIDIA GPUs) of operands that are quantised already."""
    a, b = (fp8.quantize(value, scaling=_TENSOR) for value in (x, weight))
    return partial(
        torch._scaled_mm,
        a.codes,
        b.codes.t(),
        scale_a=a.scale,
        scale_b=b.scale,
        out_dtype=DTYPE,
        use_fast_accum=True,
    )
