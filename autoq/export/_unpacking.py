"""From the tensors of a container back to codes, scales and calibration; `_packing`'s inverse."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from autoq.errors import ExportError
from autoq.export._layouts import LAYOUTS, TensorRule
from autoq.formats import Container, FormatName
from autoq.layers import LayerCalibration, LowRank, QuantizedWeight
from autoq.models import SlotKind


def expected_tensors(container: Container, fmt: FormatName) -> set[str]:
    """Names that may follow a module's in this format, its bias aside."""
    return set(LAYOUTS[container, fmt].tensors)


def checked_tensors(
    module: str,
    tensors: Mapping[str, Tensor],
    *,
    container: Container,
    fmt: FormatName,
    shape: tuple[int, int],
    kind: SlotKind,
    codes_known: bool = False,
) -> dict[str, Tensor]:
    """The module's tensors, looking as the container tabulates them; codes as of [out, in].

    Args:
        module: name for messages.
        shape: [out, in] of the matrix.
        codes_known: no values are looked for among codes, only among scales.
    Raises:
        ExportError: one is missing, unknown, of another dtype or shape, or a scale is not
            positive and finite.
    """
    rules = LAYOUTS[container, fmt].tensors
    for name, rule in rules.items():
        if name not in tensors and not rule.optional:
            raise ExportError(f"{module} is {fmt} and lacks {name}; the checkpoint is incomplete")
    checked: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name not in rules:
            raise ExportError(f"{module} is {fmt}, which has no tensor {name}; it is damaged")
        transposed = kind is SlotKind.CONV1D and name == "weight" and tensor.ndim == 2
        checked[name] = tensor.T if transposed else tensor
        looks = rules[name].is_scale or not codes_known
        _check(f"{module}.{name}", checked[name], rules[name], shape, looks_at_values=looks)
    if "weight_shape" in checked and tuple(checked["weight_shape"].tolist()) != shape:
        raise ExportError(
            f"{module}.weight_shape must be {list(shape)}, got {checked['weight_shape'].tolist()}"
        )
    return checked


def unpacked_weight(
    tensors: Mapping[str, Tensor], *, container: Container, fmt: FormatName, shape: tuple[int, int]
) -> QuantizedWeight:
    """Codes and scales of one module, from its checked tensors."""
    unpacked = LAYOUTS[container, fmt].unpack(tensors)
    return QuantizedWeight(format=fmt, tensors=unpacked, shape=shape)


def unpacked_calibration(
    tensors: Mapping[str, Tensor], weight: QuantizedWeight, container: Container
) -> LayerCalibration:
    """The calibration under which a layer computes what the stored tensors say.

    An input maximum is such that it gives the stored scale again; where the container stores the
    scale's reciprocal, the last bit can be lost. It is 0 where inputs are scaled per token.
    """
    layout = LAYOUTS[container, weight.format]
    weight_amax, input_amax = layout.amaxes(tensors, weight.tensors)
    scale = tensors.get("pre_quant_scale")
    has_scale = scale is not None and bool((scale != 1).any())
    return LayerCalibration(
        weight_amax=weight_amax,
        input_amax=input_amax,
        pre_quant_scale=scale.float() if scale is not None and has_scale else None,
        low_rank=LowRank.among(weight.tensors),
    )


def _check(
    name: str, tensor: Tensor, rule: TensorRule, shape: tuple[int, int], *, looks_at_values: bool
) -> None:
    if tensor.dtype not in rule.dtypes:
        allowed = " or ".join(_dtype_name(dtype) for dtype in rule.dtypes)
        raise ExportError(f"{name} must be {allowed}, got {_dtype_name(tensor.dtype)}")
    if not rule.takes_shape(tuple(tensor.shape), *shape):
        raise ExportError(f"{name} must have shape {rule.shape(*shape)}, got {tuple(tensor.shape)}")
    wanted = rule.wrong_values(tensor) if looks_at_values else None
    if wanted is not None:
        raise ExportError(f"{name} must {wanted}, and does not")


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
