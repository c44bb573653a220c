"""MXFP8 and MXFP4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from autoq.kernels._compile_cases.case import CompileCase
from autoq.kernels._launch import mx, mx_matmul
from autoq.kernels._launch.mx_tiles import tiles
from autoq.kernels._launch.mx_variant import Kernel, Variant, variant
from autoq.kernels._launch.tiles import Tile
from autoq.kernels._mx import BLOCK, E2M1, E4M3, Element, MXTensor, ScaleRule
from autoq.kernels.targets import TARGETS, Target

_NAMES = {E4M3: "mxfp8", E2M1: "mxfp4"}
_CONVERTS = dict.fromkeys(("sm_90", "sm_100", "sm_120"), r"cvt\.rn\.satfinite\.e4m3x2\.f32")
_N, _K = 4096, 4096


def _meta(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _packed(rows: int, element: Element) -> MXTensor:
    codes = _meta((rows, _K // element.codes_per_byte), element.dtype)
    return MXTensor(codes, _meta((rows, _K // BLOCK), torch.uint8))


def _quantize(element: Element, rule: ScaleRule, dtype: torch.dtype, target: Target) -> object:
    return mx.quantize(_meta((_N, _K), dtype), element, rule, target=target)


def _fake_quantize(element: Element, rule: ScaleRule, dtype: torch.dtype, target: Target) -> object:
    return mx.fake_quantize(_meta((_N, _K), dtype), element, rule, target=target)


def _dequantize(element: Element, dtype: torch.dtype, target: Target) -> object:
    return mx.dequantize(_packed(_N, element), dtype, target=target)


def _element_wise() -> Iterator[CompileCase]:
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    for element, dtype in itertools.product(_NAMES, dtypes):
        name, converts = str(dtype).removeprefix("torch."), _CONVERTS if element is E4M3 else {}
        for operation, launch in (("quantize", _quantize), ("fake_quantize", _fake_quantize)):
            # The rule is a number in the kernel: one dtype shows it.
            for rule in ScaleRule if dtype == torch.bfloat16 else [ScaleRule.OCP]:
                yield CompileCase(
                    operation=f"{_NAMES[element]}.{operation}",
                    variant=f"{name}, {rule} scales",
                    launch=partial(launch, element, rule, dtype),
                    instructions=converts,
                )
        yield CompileCase(
            operation=f"{_NAMES[element]}.dequantize",
            variant=name,
            launch=partial(_dequantize, element, dtype),
        )


@dataclass(frozen=True, slots=True)
class _Product:
    """Types of the operands."""

    a: Element | torch.dtype
    b: Element

    @property
    def packed(self) -> Element | None:
        """The type of the left operand, if it is packed."""
        return self.a if isinstance(self.a, Element) else None

    @property
    def units(self) -> str:
        """The type that matrix units for 16 bits take."""
        return "f16" if self.a == torch.float16 else "bf16"

    def launch(self, m: int, tile: Tile, target: Target) -> object:
        """Launch it with m rows."""
        weight = _packed(_N, self.b)
        bias = _meta((_N,), torch.bfloat16)
        if isinstance(self.a, Element):
            return mx_matmul.matmul(
                _packed(m, self.a), weight, bias, torch.bfloat16, target=target, tile=tile
            )
        x = _meta((m, _K), self.a)
        return mx_matmul.linear(
            x, weight, bias, None, ScaleRule.OCP, self.a, target=target, tile=tile
        )


def _matrix_units(target: Target, chosen: Variant, tile: Tile, product: _Product) -> str:
    """What a product must be computed with, as a regular expression."""
    if target.backend == "hip":
        scaled = chosen.kernel is Kernel.SCALED
        return r"v_mfma_scale_f32" if scaled else rf"v_mfma_f32_\d+x\d+x\d+_?{product.units}"
    if chosen.kernel is Kernel.SCALED:
        kind = "mxf4" if product.a is E2M1 else "mxf8f6f4"
        unit = r"tcgen05\.mma" if target.name == "sm_100" else r"mma\.sync"
        return rf"{unit}\S*kind::{kind}\S*block_scale"
    units = "e4m3.e4m3" if chosen.kernel is Kernel.GROUPED else product.units
    if tile.block_m >= 64 and target.name == "sm_90":
        return rf"wgmma\.mma_async\S*{units}"
    if tile.block_m >= 64 and target.name == "sm_100":
        return r"tcgen05\.mma\S*kind::f16"
    return rf"mma\.sync\S*{units}"


# (operation, rows) -> where the compiler saves one register too few.
_SPILLS: Mapping[tuple[str, int], Mapping[tuple[str, str], int]] = {
    ("mxfp8.linear", 16): {("sm_100", "3.9"): 8}
}


def _cases_of(operation: str, name: str, product: _Product) -> Iterator[CompileCase]:
    """Every tile on every target that lists it; the first for few rows with K whole too."""
    for m, split_k, most in ((16, 4, None), (16, 1, 1), (64, 4, None), (4096, 1, None)):
        instructions: dict[Tile, dict[str, str]] = {}
        for target in TARGETS.values():
            chosen = variant(target, m, _N, _K, product.packed, product.b)
            for tile in tiles(target, chosen, m)[:most]:
                units = _matrix_units(target, chosen, tile, product)
                instructions.setdefault(replace(tile, split_k=split_k), {})[target.name] = units
        for tile, units_of in instructions.items():
            shape = f"{tile.block_m}x{tile.block_n}x{tile.block_k}"
            yield CompileCase(
                operation=operation,
                variant=f"{name}, {m} rows, {shape} in {tile.stages} stages, {split_k} parts",
                launch=partial(product.launch, m, tile),
                targets=tuple(units_of),
                instructions=units_of,
                allowed_spill_bytes=_SPILLS.get((operation, m), {}),
            )


CASES = [
    *_element_wise(),
    *_cases_of("mxfp8.matmul", "MXFP8 input", _Product(E4M3, E4M3)),
    *_cases_of("mxfp4.matmul", "MXFP8 input", _Product(E4M3, E2M1)),
    *_cases_of("mxfp4.matmul", "MXFP4 input", _Product(E2M1, E2M1)),
    *_cases_of("mxfp8.linear", "bfloat16 input", _Product(torch.bfloat16, E4M3)),
    *_cases_of("mxfp4.linear", "bfloat16 input", _Product(torch.bfloat16, E2M1)),
    *_cases_of("mxfp4.linear", "float16 input", _Product(torch.float16, E2M1)),
]
