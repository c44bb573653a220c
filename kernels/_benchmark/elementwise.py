"""Quantise, dequantise and fake-quantise of every family, beside a copy of as many bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from autoq.kernels import fp8, int4, int8, mxfp4, mxfp8, nvfp4, w4a8
from autoq.kernels._benchmark import goals, naive
from autoq.kernels._benchmark.case import Case, Goal, Prepared, Work
from autoq.kernels._benchmark.timing import give_back_memory
from autoq.kernels._packed import PackedTensor

DTYPE = torch.bfloat16
_GROUP = 128


@dataclass(frozen=True, slots=True)
class Operations:
    """The three operations of one family on one tensor, its scales known."""

    packed: PackedTensor
    quantize: Work
    dequantize: Work
    fake_quantize: Work
    naive: dict[str, Work] = field(default_factory=dict)


def _fp8(scaling: fp8.Scaling, x: Tensor) -> Operations:
    """Under a given scale for the tensor, under computed ones for all others."""
    scale = fp8.scales(x, scaling) if scaling is fp8.Scaling.TENSOR else None
    packed = fp8.quantize(x, scale, scaling=scaling)
    return Operations(
        packed,
        quantize=partial(fp8.quantize, x, scale, scaling=scaling),
        dequantize=partial(fp8.dequantize, packed, DTYPE),
        fake_quantize=partial(fp8.fake_quantize, x, scale, scaling=scaling),
        naive=_naive_fp8(x, packed) if scaling is fp8.Scaling.TENSOR else {},
    )


def _naive_fp8(x: Tensor, packed: fp8.FP8Tensor) -> dict[str, Work]:
    codes, scale = packed.codes, packed.scale
    return {
        "quantize": lambda: naive.fp8_quantize(x, scale),
        "dequantize": lambda: naive.fp8_dequantize(codes, scale, DTYPE),
        "fake_quantize": lambda: naive.fp8_dequantize(naive.fp8_quantize(x, scale), scale, DTYPE),
    }


def _nvfp4(x: Tensor) -> Operations:
    packed = nvfp4.quantize(x)
    scale = packed.global_scale
    return Operations(
        packed,
        quantize=partial(nvfp4.quantize, x, scale),
        dequantize=partial(nvfp4.dequantize, packed, DTYPE),
        fake_quantize=partial(nvfp4.fake_quantize, x, scale),
        naive=_naive_nvfp4(x, packed),
    )


def _naive_nvfp4(x: Tensor, packed: nvfp4.NVFP4Tensor) -> dict[str, Work]:
    codes, block_scale, scale = packed.codes, packed.block_scale, packed.global_scale

    def fake_quantize() -> Tensor:
        return naive.nvfp4_dequantize(*naive.nvfp4_quantize(x, scale), scale, DTYPE)

    return {
        "quantize": lambda: naive.nvfp4_quantize(x, scale),
        "dequantize": lambda: naive.nvfp4_dequantize(codes, block_scale, scale, DTYPE),
        "fake_quantize": fake_quantize,
    }


def _int4(x: Tensor) -> Operations:
    packed = int4.quantize(x, group_size=_GROUP)
    scale = packed.group_scale
    codes = int4.unpack(packed)
    return Operations(
        packed,
        quantize=partial(int4.quantize, x, scale),
        dequantize=partial(int4.dequantize, packed, DTYPE),
        fake_quantize=partial(int4.fake_quantize, x, scale),
        naive={
            "quantize": lambda: naive.int4_quantize(x, scale),
            "dequantize": lambda: naive.int4_dequantize(codes, scale, DTYPE),
            "fake_quantize": lambda: naive.int4_dequantize(
                naive.int4_quantize(x, scale), scale, DTYPE
            ),
        },
    )


def _w4a8(x: Tensor) -> Operations:
    packed = w4a8.quantize(x, group_size=_GROUP)
    scales = packed.group_scale, packed.tensor_scale
    return Operations(
        packed,
        quantize=partial(w4a8.quantize, x, *scales),
        dequantize=partial(w4a8.dequantize, packed, DTYPE),
        fake_quantize=partial(w4a8.fake_quantize, x, *scales),
    )


def _int8(x: Tensor) -> Operations:
    packed = int8.quantize(x)
    return Operations(
        packed,
        quantize=partial(int8.quantize, x),
        dequantize=partial(int8.dequantize, packed, DTYPE),
        fake_quantize=partial(int8.fake_quantize, x),
    )


def _mxfp8(x: Tensor) -> Operations:
    packed = mxfp8.quantize(x)
    return Operations(
        packed,
        quantize=partial(mxfp8.quantize, x),
        dequantize=partial(mxfp8.dequantize, packed, DTYPE),
        fake_quantize=partial(mxfp8.fake_quantize, x),
    )


def _mxfp4(x: Tensor) -> Operations:
    packed = mxfp4.quantize(x)
    return Operations(
        packed,
        quantize=partial(mxfp4.quantize, x),
        dequantize=partial(mxfp4.dequantize, packed, DTYPE),
        fake_quantize=partial(mxfp4.fake_quantize, x),
    )


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    variant: str
    make: Callable[[Tensor], Operations]


FAMILIES = (
    *(_Family("fp8", scaling.value, partial(_fp8, scaling)) for scaling in fp8.Scaling),
    _Family("nvfp4", "global scale given", _nvfp4),
    _Family("int4", f"groups of {_GROUP}", _int4),
    _Family("w4a8", f"groups of {_GROUP}", _w4a8),
    _Family("int8", "row", _int8),
    _Family("mxfp8", "blocks of 32", _mxfp8),
    _Family("mxfp4", "blocks of 32", _mxfp4),
)

_NAMES = ("quantize", "dequantize", "fake_quantize")


def cases(rows: int, columns: int) -> Iterator[Case]:
    """Every operation of every family on a bfloat16 tensor [rows, columns]."""
    shape = {"rows": rows, "columns": columns}
    for family in FAMILIES:
        for name in _NAMES:
            yield Case(
                operation=f"{family.name}.{name}",
                variant=family.variant,
                shape=shape,
                dtype=DTYPE,
                prepare=partial(_prepare, family, name, rows, columns),
                compiles=name == "fake_quantize",
                goals=_goals(family, name),
            )


def _goals(family: _Family, name: str) -> tuple[Goal, ...]:
    if name == "fake_quantize":
        if family.variant == fp8.Scaling.TENSOR.value:
            return goals.FAKE_QUANTIZE_FP8_TENSOR
        return goals.FAKE_QUANTIZE_NVFP4 if family.name == "nvfp4" else goals.FAKE_QUANTIZE
    if name == "quantize":
        by_family = {"fp8": goals.QUANTIZE_FP8, "nvfp4": goals.QUANTIZE_NVFP4}
        return by_family.get(family.name, ())
    return ()


def _prepare(family: _Family, name: str, rows: int, columns: int, device: torch.device) -> Prepared:
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, columns, device=device, generator=generator).to(DTYPE)
    operations = family.make(x)
    moved = 2 * x.nbytes if name == "fake_quantize" else x.nbytes + operations.packed.nbytes
    baselines = copies(moved, device)
    if name in operations.naive:
        baselines["naive"] = operations.naive[name]
    return Prepared(
        getattr(operations, name),
        baselines,
        logical_bytes=moved,
        before=give_back_memory if device.type == "cpu" else None,
    )


def copies(moved: int, device: torch.device) -> dict[str, Work]:
    """Copies that read and write `moved` bytes together.

    On a CPU also one into memory that is new, as results are: the first touch of its pages takes
    most of the time. On GPUs torch keeps memory.
    """
    source = torch.ones(moved // 2, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    baselines: dict[str, Work] = {"copy": partial(target.copy_, source)}
    if device.type == "cpu":
        baselines["clone"] = source.clone
    return baselines
