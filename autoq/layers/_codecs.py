"""What the element types and activation schemes do to numbers, as tables.

A new element type or activation scheme adds rows here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from autoq.formats import ActivationScheme, QuantFormat, WeightElement
from autoq.kernels import fp8, int4, nvfp4, w4a8
from autoq.kernels._packed import PackedTensor
from autoq.kernels.scoring import Scheme
from autoq.layers._types import Container, LayerCalibration

_Tensors: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightCodec:
    """What one element type does to a weight [N, K] that is smoothed already.

    The arguments are those of the public functions, in their order.
    """

    tensors: tuple[str, ...]  # names in QuantizedWeight.tensors
    quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], _Tensors]
    pack: Callable[[_Tensors, Container], PackedTensor]
    fake_quantize: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype, Container], Tensor]
    grid: Callable[[Tensor, QuantFormat, LayerCalibration, torch.dtype], CodeGrid] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class CodeGrid:
    """The values that a weight [N, K] can take in a 4-bit element, once its scales are chosen.

    Of W4A8 those before the second level rounds them to E4M3.
    """

    levels: Tensor  # float32 [L], ascending
    nibbles: Tensor  # uint8 [L]: the code of each level
    step: Tensor  # float32 [N, K], positive: weights are levels times it

    def pack(self, indices: Tensor) -> Tensor:
        """`LayerCalibration.codes` from indices of levels, uint8 [N, K]."""
        codes = self.nibbles[indices.int()]
        return codes[:, ::2] | codes[:, 1::2] << 4


@dataclass(frozen=True, slots=True)
class Family:
    """What the kernels do with one kind of packed weight."""

    linear: Callable[..., Tensor]  # x, weight, bias, input_scale=
    dequantize: Callable[..., Tensor]  # weight, dtype


def _quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> _Tensors:
    return fp8.quantize(weight, fp8.tensor_scale(calibration.weight_amax)).tensors()


def _pack_e4m3(tensors: _Tensors, _: Container) -> fp8.FP8Tensor:
    return fp8.FP8Tensor(tensors["codes"], tensors["scale"], fp8.Scaling.TENSOR)


def _fake_quantize_e4m3(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype, ___: Container
) -> Tensor:
    return fp8.fake_quantize(weight, fp8.tensor_scale(calibration.weight_amax))


def _quantize_e2m1(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> _Tensors:
    scale = nvfp4.global_scale(calibration.weight_amax).to(weight.device)
    block_scale = _e2m1_block_scale(weight, scale, calibration)
    if calibration.codes is None or block_scale is None:
        return nvfp4.quantize(weight, scale, block_scale).tensors()
    codes = calibration.codes.to(weight.device)
    return nvfp4.NVFP4Tensor(codes=codes, block_scale=block_scale, global_scale=scale).tensors()


def _e2m1_grid(
    weight: Tensor, _: QuantFormat, calibration: LayerCalibration, __: torch.dtype
) -> CodeGrid:
    scale = nvfp4.global_scale(calibration.weight_amax).to(weight.device)
    block_scale = _e2m1_block_scale(weight, scale, calibration)
    assert block_scale is not None  # codes are found where errors are weighed
    magnitudes = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], device=weight.device)
    numbers = torch.arange(1, 8, dtype=torch.uint8, device=weight.device)
    return CodeGrid(
        levels=torch.cat([-magnitudes.flip(0), torch.zeros_like(magnitudes[:1]), magnitudes]),
        nibbles=torch.cat([numbers.flip(0) | 8, torch.zeros_like(numbers[:1]), numbers]),
        step=(block_scale.float() * scale).repeat_interleave(nvfp4.BLOCK, dim=1),
    )


def _e2m1_block_scale(
    weight: Tensor, scale: Tensor, calibration: LayerCalibration
) -> Tensor | None:
    if calibration.importance is None:
        return None
    return nvfp4.choose_block_scale(weight, scale, calibration.importance)


def _pack_e2m1(tensors: _Tensors, container: Container) -> nvfp4.NVFP4Tensor:
    scale = _read_global_scale(tensors["global_scale"], container)
    return nvfp4.NVFP4Tensor(
        codes=tensors["codes"], block_scale=tensors["block_scale"], global_scale=scale
    )


def _fake_quantize_e2m1(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    scale = nvfp4.global_scale(calibration.weight_amax)
    if calibration.codes is None and torch.equal(_read_global_scale(scale, container), scale):
        block_scale = _e2m1_block_scale(weight, scale, calibration)
        return nvfp4.fake_quantize(weight, scale, block_scale)
    tensors = _quantize_e2m1(weight, fmt, calibration, scale_dtype)
    return nvfp4.dequantize(_pack_e2m1(tensors, container), weight.dtype)


def _read_global_scale(scale: Tensor, container: Container) -> Tensor:
    """The scale that a reader has: compressed-tensors stores its reciprocal.

    Two reciprocals change the last bit of about one scale in six.
    """
    if container is Container.COMPRESSED_TENSORS:
        return scale.reciprocal().reciprocal()
    return scale


def _quantize_int4(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> _Tensors:
    group_scale = int4_group_scale(weight, fmt, scale_dtype, calibration.importance)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax)
    if calibration.codes is None:
        codes = int4.unpack(int4.quantize(weight, group_scale))
    else:
        codes = _signed_nibbles(calibration.codes.to(weight.device))
    return {
        "codes": codes,
        "group_scale": group_scale,
        "tensor_scale": tensor_scale.to(weight.device),
    }


def _signed_nibbles(packed: Tensor) -> Tensor:
    """int8 [N, K] in -8..7 of uint8 [N, K/2], even column in the low nibble."""
    nibbles = torch.stack([packed << 4, packed & 0xF0], dim=-1).flatten(-2)
    return nibbles.view(torch.int8) >> 4


def _int4_grid(
    weight: Tensor, fmt: QuantFormat, calibration: LayerCalibration, scale_dtype: torch.dtype
) -> CodeGrid:
    group_scale = int4_group_scale(weight, fmt, scale_dtype, calibration.importance)
    levels = torch.arange(-8, 8, device=weight.device)
    return CodeGrid(
        levels=levels.float(),
        nibbles=levels.to(torch.uint8) & 0xF,
        step=group_scale.repeat_interleave(weight.shape[1] // group_scale.shape[1], dim=1),
    )


def _pack_int4(tensors: _Tensors, container: Container) -> int4.INT4Tensor | w4a8.W4A8Tensor:
    packed = int4.pack(tensors["codes"], tensors["group_scale"])
    if container is Container.COMPRESSED_TENSORS:
        return packed
    return w4a8.W4A8Tensor(
        codes=packed.codes, group_scale=packed.group_scale, tensor_scale=tensors["tensor_scale"]
    )


def _fake_quantize_int4(
    weight: Tensor,
    fmt: QuantFormat,
    calibration: LayerCalibration,
    scale_dtype: torch.dtype,
    container: Container,
) -> Tensor:
    if calibration.codes is not None:
        tensors = _quantize_int4(weight, fmt, calibration, scale_dtype)
        packed = _pack_int4(tensors, container)
        return FAMILIES[type(packed)].dequantize(packed, weight.dtype)
    group_scale = int4_group_scale(weight, fmt, scale_dtype, calibration.importance)
    if container is Container.COMPRESSED_TENSORS:
        return int4.fake_quantize(weight, group_scale)
    tensor_scale = fp8.tensor_scale(calibration.weight_amax)
    return w4a8.fake_quantize(weight, group_scale, tensor_scale)


def int4_group_scale(
    weight: Tensor, fmt: QuantFormat, scale_dtype: torch.dtype, importance: Tensor | None
) -> Tensor:
    """Scales of the groups of W / p, rounded to `scale_dtype`; see `LayerCalibration.importance`."""
    group_size = fmt.weight_block_size or weight.shape[-1]
    if importance is None:
        return int4.group_scale(weight, group_size, storage_dtype=scale_dtype)
    return int4.choose_group_scale(weight, importance, group_size, storage_dtype=scale_dtype)


def _keep_input(x: Tensor, _: float) -> Tensor:
    return x


def _fake_quantize_fp8_input(x: Tensor, amax: float) -> Tensor:
    return fp8.fake_quantize(x, fp8.tensor_scale(amax))


def _fake_quantize_nvfp4_input(x: Tensor, amax: float) -> Tensor:
    return nvfp4.fake_quantize(x, nvfp4.global_scale(amax))


def _e4m3_scheme(calibration: LayerCalibration, _: Container) -> tuple[Scheme, Tensor]:
    return Scheme.FP8_TENSOR, fp8.tensor_scale(calibration.weight_amax)


def _e2m1_scheme(
    calibration: LayerCalibration, container: Container
) -> tuple[Scheme, Tensor] | None:
    scale = nvfp4.global_scale(calibration.weight_amax)
    chooses_scales = calibration.importance is not None
    if chooses_scales or not torch.equal(_read_global_scale(scale, container), scale):
        return None
    return Scheme.NVFP4, scale


FAMILIES: Mapping[type[PackedTensor], Family] = {
    fp8.FP8Tensor: Family(fp8.linear, fp8.dequantize),
    nvfp4.NVFP4Tensor: Family(nvfp4.linear, nvfp4.dequantize),
    int4.INT4Tensor: Family(w4a8.linear, int4.dequantize),
    w4a8.W4A8Tensor: Family(w4a8.linear, w4a8.dequantize),
}
"""Plain INT4 weights meet FP8 inputs: no format has them with inputs as they are."""

WEIGHT_CODECS: Mapping[WeightElement, WeightCodec] = {
    WeightElement.E4M3: WeightCodec(
        tensors=("codes", "scale"),
        quantize=_quantize_e4m3,
        pack=_pack_e4m3,
        fake_quantize=_fake_quantize_e4m3,
    ),
    WeightElement.E2M1: WeightCodec(
        tensors=("codes", "block_scale", "global_scale"),
        quantize=_quantize_e2m1,
        pack=_pack_e2m1,
        fake_quantize=_fake_quantize_e2m1,
        grid=_e2m1_grid,
    ),
    WeightElement.INT4: WeightCodec(
        tensors=("codes", "group_scale", "tensor_scale"),
        quantize=_quantize_int4,
        pack=_pack_int4,
        fake_quantize=_fake_quantize_int4,
        grid=_int4_grid,
    ),
}

INPUT_QUANTIZERS: Mapping[ActivationScheme, Callable[[Tensor, float], Tensor]] = {
    ActivationScheme.NONE: _keep_input,
    ActivationScheme.FP8_STATIC_TENSOR: _fake_quantize_fp8_input,
    ActivationScheme.NVFP4_DYNAMIC: _fake_quantize_nvfp4_input,
}

INPUT_SCALES: Mapping[ActivationScheme, Callable[[float], Tensor]] = {
    ActivationScheme.FP8_STATIC_TENSOR: fp8.tensor_scale,
    ActivationScheme.NVFP4_DYNAMIC: nvfp4.global_scale,
}

PER_TOKEN_INPUTS = frozenset({(WeightElement.INT4, Container.COMPRESSED_TENSORS)})
"""Where a container's run time overrules the format's activation scheme."""

WEIGHT_SCHEMES: Mapping[
    WeightElement, Callable[[LayerCalibration, Container], tuple[Scheme, Tensor] | None]
] = {
    WeightElement.E4M3: _e4m3_scheme,
    WeightElement.E2M1: _e2m1_scheme,
}
"""How `fake_quantize` rounds a weight, where kernels can do that themselves."""
