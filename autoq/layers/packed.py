"""Matrices that stay packed: modules that multiply with codes and scales as they are stored.

They compute what the simulation computes. On a CPU that is bit for bit
`functional.linear(fake_quantize_input(x), dequantize_weight(weight), bias)`, the weight
dequantised for the one product; GPU kernels multiply the codes. No gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autoq.errors import ModelError
from autoq.formats import FORMATS, WeightScaling
from autoq.kernels._packed import PackedTensor
from autoq.layers._codecs import DEQUANTIZERS, LINEARS
from autoq.layers._types import Container, LayerCalibration, QuantizedWeight
from autoq.layers.low_rank import DOWN, UP, LowRank
from autoq.layers.quantize import fake_quantize_input, input_scale, packed_weight

_EAGER = "if these are a mixture's experts, call model.set_experts_implementation('eager')"


class PackedMatrix(nn.Module):
    """Stands where a model keeps a matrix [out_features, in_features].

    It is called with the input, and `torch.nn.functional.linear(x, matrix)` calls it as well: that
    is how transformers' fused experts multiply with slices of their parameters.
    """

    in_features: int
    out_features: int

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        is_product = function is nn.functional.linear and len(args) == 2 and not kwargs
        if is_product and isinstance(args[1], PackedMatrix):
            return args[1](args[0])
        raise ModelError(
            "packed weights multiply with torch.nn.functional.linear only, and "
            f"{getattr(function, '__name__', function)} was called; {_EAGER}"
        )


class PackedLinear(PackedMatrix):
    """A linear layer, or one expert's matrix, that holds codes and scales.

    Its buffers are those of the record of the format's kernels, `input_scale`,
    `pre_quant_scale` where one is not folded, and the factors of a branch of low rank. They keep their dtypes when a model is cast.
    """

    bias: nn.Parameter | None
    input_scale: Tensor | None
    pre_quant_scale: Tensor | None
    low_rank_down: Tensor | None
    low_rank_up: Tensor | None

    def __init__(
        self,
        weight: QuantizedWeight,
        calibration: LayerCalibration,
        *,
        container: Container,
        dtype: torch.dtype,
        bias: nn.Parameter | None = None,
        transposed: bool = False,
    ) -> None:
        """
        Args:
            weight: codes and scales [out_features, in_features].
            calibration: how the input is scaled.
            container: whose run time is meant.
            dtype: of the layer that this one replaces.
            bias: [out_features].
            transposed: whether that layer keeps its weight as [in_features, out_features].
        """
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.format = FORMATS[weight.format]
        self.transposed = transposed
        self.dtype = dtype
        record = packed_weight(weight, container=container)
        self._dequantize = DEQUANTIZERS[type(record)]
        self._product = LINEARS[type(record), self.format.activation_in(container)]
        self._names = tuple(record.tensors())
        for name, tensor in record.tensors().items():
            # A copy: what was read may be a view of a file that can change.
            self.register_buffer(name, tensor.clone(memory_format=torch.contiguous_format))
        # Without the tensors: they would stay where they are when the module moves.
        self._template = replace(record, **dict.fromkeys(self._names, torch.empty(0)))
        for name in (DOWN, UP):
            factor = weight.tensors.get(name)
            self.register_buffer(name, None if factor is None else factor.clone())
        plain = replace(calibration, pre_quant_scale=None, low_rank=None)
        self._container, self._calibration = container, plain
        scale = input_scale(self.format, calibration, container=container)
        self.register_buffer("input_scale", scale)
        smoothing = calibration.pre_quant_scale
        self.register_buffer("pre_quant_scale", None if smoothing is None else smoothing.to(dtype))
        self.register_parameter("bias", bias)

    @property
    def packed(self) -> PackedTensor:
        """Codes and scales, as the kernels take them."""
        return replace(self._template, **{name: getattr(self, name) for name in self._names})

    @property
    def branch(self) -> LowRank | None:
        """What is added to the product of the codes, in formats that have that."""
        if self.low_rank_down is None or self.low_rank_up is None:
            return None
        return LowRank(self.low_rank_down, self.low_rank_up)

    @property
    def weight(self) -> Tensor:
        """The dequantised weight, as the layer that this one replaces keeps it.

        Looking at dtype, device and shape costs nothing; whatever reads the values has them
        computed for the occasion.
        """
        return _DequantizedWeight(self)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """What codes stand for, [out_features, in_features]: the weight less `branch`."""
        return self._dequantize(self.packed, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features], float32, bfloat16 or float16, to [..., out_features]."""
        if self.pre_quant_scale is not None:
            x = x * self.pre_quant_scale.to(x.dtype)
        if self.transposed and x.device.type == "cpu":
            product = self._transposed_product(x)
        else:
            product = self._product(x, self.packed, self.bias, input_scale=self.input_scale)
        branch = self.branch
        return product if branch is None else product + branch.product(x)

    def _transposed_product(self, x: Tensor) -> Tensor:
        """The weight laid out as the model keeps it: how BLAS rounds depends on that."""
        values = fake_quantize_input(x, self.format, self._calibration, container=self._container)
        matrix = self.dequantized(x.dtype).t().contiguous().t()
        return nn.functional.linear(values, matrix, self.bias)

    def extra_repr(self) -> str:
        """The format and its bits, for `repr`."""
        bits = self.format.storage_bits(self.out_features, self.in_features).effective_bits
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, format={self.format.name}, "
            f"bits={bits / (self.out_features * self.in_features):.4g}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLinear:
        """Move like any module; a cast changes the dtype computed in, and no code or scale."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, original in before.items():
            moved = self._buffers[name]
            if original is not None and moved is not None and moved.dtype != original.dtype:
                self._buffers[name] = original.to(moved.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return self


class PackedRows(PackedMatrix):
    """A matrix whose rows lie in several packed ones, each under its own top scale."""

    def __init__(self, parts: Sequence[PackedLinear]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.in_features = parts[0].in_features
        self.out_features = sum(part.out_features for part in parts)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] to [..., out_features]."""
        return torch.cat([part(x) for part in self.parts], dim=-1)


class PackedExperts(nn.ModuleList):
    """Stands where a mixture layer keeps a parameter [experts, out_features, in_features]."""

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, Tensor) and index.numel() != 1:
            raise ModelError(f"packed experts multiply one by one, got several at once; {_EAGER}")
        return super().__getitem__(int(index) if isinstance(index, Tensor) else index)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise AttributeError(f"packed experts have no {name!r}; {_EAGER}") from None

    __torch_function__ = PackedMatrix.__torch_function__


class _DequantizedWeight(Tensor):
    """Looks like the weight of a packed linear; its values are computed when they are read."""

    _of: PackedLinear

    @staticmethod
    def __new__(cls, linear: PackedLinear) -> Self:
        rows, columns = linear.out_features, linear.in_features
        made: Self = Tensor._make_wrapper_subclass(
            cls,
            (columns, rows) if linear.transposed else (rows, columns),
            dtype=linear.dtype,
            device=linear.get_buffer(linear._names[0]).device,
        )
        made._of = linear
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function._schema.is_mutable:
            raise ModelError("a packed weight cannot be written to; load the original model")
        args, kwargs = tree_map_only(cls, _values, (args, kwargs or {}))
        return function(*args, **kwargs)


def _values(weight: _DequantizedWeight) -> Tensor:
    linear = weight._of
    matrix = linear.dequantized(weight.dtype)
    branch = linear.branch
    if branch is not None:
        matrix = (matrix.float() + branch.values()).to(weight.dtype)
    return matrix.t() if linear.transposed else matrix


def packed_rows(
    parts: Sequence[QuantizedWeight], calibration: LayerCalibration, **options: Any
) -> PackedLinear | PackedRows:
    """One matrix of packed parts that follow each other by row.

    Args:
        parts: at least one, of one format and with as many columns.
        calibration: of them all.
        options: keyword arguments of `PackedLinear`; no bias where top scales differ.
    """
    whole = _joined(parts)
    if whole is not None:
        return PackedLinear(whole, calibration, **options)
    return PackedRows([PackedLinear(part, calibration, **options) for part in parts])


def _joined(parts: Sequence[QuantizedWeight]) -> QuantizedWeight | None:
    """The parts as one, or None where their top scales or branches of low rank differ, or blocks
    would cross from one to the next."""
    first = parts[0]
    if len(parts) == 1:
        return first
    fmt = FORMATS[first.format]
    if fmt.weight_scaling is WeightScaling.DOUBLE_GROUP:
        return None  # blocks of scales begin anew in each part
    height = fmt.weight_block_size if fmt.weight_scaling is WeightScaling.BLOCK else 1
    if any(part.shape[0] % (height or 1) for part in parts[:-1]):
        return None
    tensors = {}
    for name, tensor in first.tensors.items():
        same = [part.tensors[name] for part in parts]
        if tensor.ndim == 2 and name != DOWN:
            tensors[name] = torch.cat(same)
        elif all(torch.equal(tensor, other) for other in same):
            tensors[name] = tensor
        else:
            return None
    rows = sum(part.shape[0] for part in parts)
    return QuantizedWeight(format=first.format, tensors=tensors, shape=(rows, first.shape[1]))
