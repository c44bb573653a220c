"""What scoring keeps while it runs: sampled projections, quantised inputs, errors of weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

import torch
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.formats import FORMATS, FormatName
from autoq.kernels import scoring
from autoq.kernels.scoring import Scheme
from autoq.layers import LayerCalibration
from autoq.layers.quantize import (
    Container,
    fake_quantize_input,
    fake_quantize_weight,
    weight_scheme,
)
from autoq.layers.taps import MatrixCall
from autoq.models import GroupName, SlotName, WeightSlot
from autoq.models.weights import slot_weight

WEIGHT_ERROR_CACHE_BYTES = 1 << 30
"""Memory for quantisation errors of weights kept from batch to batch; the rest is recomputed."""

LARGEST_ERROR_BYTES = 1 << 30
"""Larger errors never exist as a whole, where the format's rounding can be fused with their use."""

Calibrations: TypeAlias = Mapping[tuple[SlotName, FormatName], LayerCalibration]

Rows: TypeAlias = Tensor | slice
"""Row numbers, or all rows."""


def projection_dtype(model: nn.Module) -> torch.dtype:
    """The dtype in which gradients meet quantisation errors of weights.

    The model's own, but bfloat16 on CPUs that multiply it in hardware, where it is several times
    as fast as float32. Both operands are small differences or gradients, not differences of large
    numbers, so eight bits of mantissa move a projection by well under a per cent of itself: far
    less than the choice of calibration tokens does.
    """
    parameter = next(model.parameters())
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    in_hardware = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    if parameter.device.type == "cpu" and in_hardware:
        return torch.bfloat16
    return parameter.dtype


class Projections:
    """The projections of one batch: which tokens, and their sums by group."""

    def __init__(self, row_fraction: float, seed: int) -> None:
        self.sequences = 1
        self.sums: dict[tuple[GroupName, int], Tensor] = {}
        self._row_fraction = row_fraction
        self._seed = seed
        self._samples: dict[int, Tensor] = {}

    def accumulator(
        self, group: GroupName, total_rows: int, formats: int, device: torch.device
    ) -> Tensor:
        """The group's sums, float32 [formats, sampled tokens]."""
        key = (group, total_rows)
        if key not in self.sums:
            sampled = self._sample(total_rows).numel()
            self.sums[key] = torch.zeros(formats, sampled, device=device)
        return self.sums[key]

    def sampled(self, call: MatrixCall, inputs: Tensor) -> tuple[int, Rows, Rows]:
        """(tokens in the batch, the input rows to take, their positions among the sampled)."""
        if call.token_rows is None:
            total = inputs.shape[0]
            if total % self.sequences:
                raise ModelError(
                    f"scoring needs as many rows from every sequence, and {call.slot.name} gets "
                    f"{total} of {self.sequences} sequences; exclude it with --exclude "
                    f"'{call.slot.name}'"
                )
            if self._row_fraction == 1.0:
                return total, slice(None), slice(None)
            return total, self._sample(total).to(inputs.device), slice(None)
        total = call.token_count
        sample = self._sample(total).to(inputs.device)
        position = torch.full((total,), -1, dtype=torch.long, device=inputs.device)
        position[sample] = torch.arange(sample.numel(), device=inputs.device)
        positions = position[call.token_rows]
        rows = torch.nonzero(positions >= 0).flatten()
        return total, rows, positions[rows]

    def _sample(self, total_rows: int) -> Tensor:
        """Rows to take, ascending, as many from every sequence."""
        if total_rows not in self._samples:
            length = total_rows // self.sequences
            take = max(1, round(self._row_fraction * length))
            generator = torch.Generator().manual_seed(self._seed)
            order = torch.rand(self.sequences, length, generator=generator).argsort(dim=1)
            within = order[:, :take].sort(dim=1).values
            start = torch.arange(self.sequences)[:, None] * length
            self._samples[total_rows] = (within + start).flatten()
        return self._samples[total_rows]


class QuantizedInputs:
    """The inputs of a fusion set in every format, as the exact layer would have to see them."""

    def __init__(self, leader: SlotName, inputs: Tensor, container: Container) -> None:
        self.leader = leader
        self.inputs = inputs
        self.exact = inputs.float()
        self._container = container
        self._by_format: dict[FormatName, Tensor] = {}

    def get(self, name: FormatName, calibration: LayerCalibration) -> Tensor:
        """Quantised inputs with the input scale divided out again, float32 [rows, in_features]."""
        if name not in self._by_format:
            changed = fake_quantize_input(
                self.inputs, FORMATS[name], calibration, container=self._container
            ).float()
            if calibration.pre_quant_scale is not None:
                changed /= calibration.pre_quant_scale.to(changed.device)
            self._by_format[name] = changed
        return self._by_format[name]


class WeightErrors:
    """What quantising weights does: quantised minus exact ones, kept within a memory bound."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibrations,
        container: Container,
        scale_dtype: torch.dtype,
        dtype: torch.dtype,
    ) -> None:
        self._model = model
        self._calibration = calibration
        self._container = container
        self._scale_dtype = scale_dtype
        self._dtype = dtype
        self._kept: dict[tuple[SlotName, FormatName], Tensor] = {}
        self._free_bytes = WEIGHT_ERROR_CACHE_BYTES

    def project(
        self, slot: WeightSlot, name: FormatName, output_gradient: Tensor, *inputs: Tensor
    ) -> Tensor:
        """`scoring.project` with the error of the slot's weight in the format.

        Args:
            output_gradient: in the dtype of the errors.
            inputs: quantised inputs, exact inputs, and the gradient to them.
        """
        scheme = self._scheme(slot, name)
        if scheme is None:
            return scoring.project(output_gradient, self.get(slot, name), *inputs)
        weight = slot_weight(self._model, slot)
        return scoring.project_weight(output_gradient, weight, *scheme, *inputs)

    def _scheme(self, slot: WeightSlot, name: FormatName) -> tuple[Scheme, Tensor] | None:
        """How to make the error piece by piece, if it is too large to be made at once.

        That depends on nothing but the slot and the format: pieces are summed in another order,
        and a scorer that goes on from a later batch has to get the same bits.
        """
        if slot.weights * self._dtype.itemsize <= LARGEST_ERROR_BYTES:
            return None
        calibration = self._calibration[slot.name, name]
        return weight_scheme(FORMATS[name], calibration, container=self._container)

    def get(self, slot: WeightSlot, name: FormatName) -> Tensor:
        """The error of the slot's weight in the format, [out_features, in_features]."""
        key = (slot.name, name)
        if key in self._kept:
            return self._kept[key]
        error = self._compute(slot, name)
        if error.nbytes <= self._free_bytes:
            self._free_bytes -= error.nbytes
            self._kept[key] = error
        return error

    def _compute(self, slot: WeightSlot, name: FormatName) -> Tensor:
        weight = slot_weight(self._model, slot)
        exact = weight.float()
        calibration = self._calibration[slot.name, name]
        quantized = fake_quantize_weight(
            exact,
            FORMATS[name],
            calibration,
            scale_dtype=self._scale_dtype,
            container=self._container,
        )
        if calibration.pre_quant_scale is not None:
            quantized = quantized * calibration.pre_quant_scale.to(quantized.device)
        return (quantized - exact).to(self._dtype)
