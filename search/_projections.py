"""What scoring keeps while it runs: sampled projections, quantised inputs, errors of weights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from autoq.search._branches import surplus_projections

WEIGHT_ERROR_CACHE_BYTES = 1 << 30
"""Memory for quantisation errors of weights kept from batch to batch; the rest is recomputed."""

LARGEST_ERROR_BYTES = 1 << 30
"""Larger errors never exist as a whole, where the format's rounding can be fused with their use."""

_UNIFORM_STREAM = 0x9E3779B97F4A7C15 >> 1

Calibrations: TypeAlias = Mapping[tuple[SlotName, FormatName], LayerCalibration]

Rows: TypeAlias = Tensor | slice
"""Row numbers, or all rows."""


def projection_dtype(model: nn.Module, device: torch.device | None = None) -> torch.dtype:
    """The dtype in which gradients meet quantisation errors of weights.

    The model's own, but bfloat16 on CPUs that multiply it in hardware, where it is several times
    as fast as float32. Both operands are small differences or gradients, not differences of large
    numbers, so eight bits of mantissa move a projection by well under a per cent of itself: far
    less than the choice of calibration tokens does.

    Args:
        device: where the model's weights will be, if they are on the meta device now.
    """
    parameter = next(model.parameters())
    place = parameter.device if device is None else device
    capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
    in_hardware = any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    if place.type == "cpu" and in_hardware:
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
        self._uniform: dict[int, Tensor] = {}

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

    def uniform(self, rows: int, device: torch.device) -> Tensor:
        """Random numbers in [0, 1), float64 [rows]: the same for all groups with so many tokens.

        So groups that take a token with the same probability take it together.
        """
        if rows not in self._uniform:
            # Not the seed of the labels, or of whole batches: numbers of one stream are related.
            generator = torch.Generator().manual_seed(self._seed ^ _UNIFORM_STREAM)
            drawn = torch.rand(rows, generator=generator, dtype=torch.float64)
            self._uniform[rows] = drawn.to(device)
        return self._uniform[rows]

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


def same_tensor(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors hold the same numbers; looks at them only if they are not one tensor.

    Both must be alive, or an address says nothing.
    """
    mine, theirs = ((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in (first, second))
    return mine == theirs or torch.equal(first, second)


def seen_inputs(
    inputs: Tensor, name: FormatName, calibration: LayerCalibration, container: Container
) -> Tensor:
    """What a format leaves of inputs, as the exact layer would have to see it.

    Returns:
        Quantised inputs with the input scale divided out again, float32 [rows, in_features].
    """
    changed = fake_quantize_input(inputs, FORMATS[name], calibration, container=container).float()
    if calibration.pre_quant_scale is not None:
        changed /= calibration.pre_quant_scale.to(changed.device)
    return changed


class QuantizedInputs:
    """The inputs of a fusion set in every format, as the exact layer would have to see them."""

    def __init__(self, leader: SlotName, inputs: Tensor, container: Container) -> None:
        self.leader = leader
        self.inputs = inputs
        self.exact = inputs.float()
        self._container = container
        self._by_format: dict[FormatName, Tensor] = {}

    def get(self, name: FormatName, calibration: LayerCalibration) -> Tensor:
        """See `seen_inputs`."""
        if name not in self._by_format:
            self._by_format[name] = seen_inputs(self.inputs, name, calibration, self._container)
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
        self._kept: dict[tuple[tuple[SlotName, ...], FormatName], Tensor] = {}
        self._free_bytes = WEIGHT_ERROR_CACHE_BYTES
        self._room: Tensor | None = None  # flat; what is left of the memory for errors that stay

    def reserve(self, slots: Iterable[WeightSlot], names: Iterable[FormatName]) -> None:
        """Take memory for the errors that will be kept in one piece; call before a pass runs.

        One by one they would settle between buffers that come and go, and each would keep a C
        library's allocator from joining its neighbours: 35 MB more of resident memory beside 21 MB
        of errors, measured on the bundled model with glibc 2.36. CUDA's allocator has no such need.
        """
        if next(self._model.parameters()).device.type != "cpu":
            return
        wanted = [(slot, name) for slot in slots for name in names]
        sizes = [
            slot.weights
            for slot, name in wanted
            if (slot.name, name) in self._calibration and self._scheme(slot, name) is None
        ]
        most = WEIGHT_ERROR_CACHE_BYTES // self._dtype.itemsize
        self._room = torch.empty(min(sum(sizes), most), dtype=self._dtype)

    def keep(self, most_bytes: int) -> None:
        """Forget what is kept, and keep no more than so much from now on."""
        self._kept.clear()
        self._free_bytes = most_bytes

    @property
    def most_weights(self) -> int:
        """Of errors that are made as a whole."""
        return LARGEST_ERROR_BYTES // self._dtype.itemsize

    def project(
        self,
        slots: tuple[WeightSlot, ...],
        name: FormatName,
        output_gradient: Tensor,
        *inputs: Tensor,
    ) -> Tensor:
        """`scoring.project` with the error of the slots' weights in the format, one upon the other.

        Args:
            slots: one, or several that have no more than `most_weights` together.
            output_gradient: in the dtype of the errors; of several slots side by side.
            inputs: quantised inputs, exact inputs, and the gradient to them.
        Returns:
            float32 [rows]; without what a branch of low rank would do to quantised inputs.
        """
        scheme = self._scheme(slots[0], name) if len(slots) == 1 else None
        if scheme is not None:
            weight = slot_weight(self._model, slots[0])
            return scoring.project_weight(output_gradient, weight, *scheme, *inputs)
        projections = scoring.project(output_gradient, self._stacked(slots, name), *inputs)
        calibrations = [self._calibration[slot.name, name] for slot in slots]
        surplus = surplus_projections(calibrations, output_gradient, *inputs[:2])
        return projections if surplus is None else projections - surplus

    def _scheme(self, slot: WeightSlot, name: FormatName) -> tuple[Scheme, Tensor] | None:
        """How to make the error piece by piece, if it is too large to be made at once.

        That depends on nothing but the slot and the format: pieces are summed in another order,
        and a scorer that goes on from a later batch has to get the same bits.
        """
        if slot.weights <= self.most_weights:
            return None
        calibration = self._calibration[slot.name, name]
        return weight_scheme(FORMATS[name], calibration, container=self._container)

    def get(self, slot: WeightSlot, name: FormatName) -> Tensor:
        """The error of the slot's weight in the format, branches of low rank among it,
        [out_features, in_features]."""
        return self._stacked((slot,), name)

    def _stacked(self, slots: tuple[WeightSlot, ...], name: FormatName) -> Tensor:
        """Errors of slots one upon the other, [sum of out_features, in_features]."""
        key = (tuple(slot.name for slot in slots), name)
        if key in self._kept:
            return self._kept[key]
        error = self._compute(slots[0], name) if len(slots) == 1 else self._join(slots, name)
        if error.nbytes <= self._free_bytes:
            self._free_bytes -= error.nbytes
            self._kept[key] = error = self._settled(error)
        return error

    def _join(self, slots: tuple[WeightSlot, ...], name: FormatName) -> Tensor:
        first = self._compute(slots[0], name)
        joined = first.new_empty(sum(slot.out_features for slot in slots), first.shape[1])
        start = 0
        for slot in slots:
            error = first if slot is slots[0] else self._compute(slot, name)
            joined[start : start + len(error)] = error
            start += len(error)
        return joined

    def _settled(self, error: Tensor) -> Tensor:
        """The same values in the reserved memory, if there is any left."""
        if self._room is None or error.numel() > self._room.numel():
            return error
        place, self._room = self._room[: error.numel()], self._room[error.numel() :]
        return place.view_as(error).copy_(error)

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
        if calibration.low_rank is not None:
            quantized = quantized + calibration.low_rank.values().to(quantized.device)
        if calibration.pre_quant_scale is not None:
            quantized = quantized * calibration.pre_quant_scale.to(quantized.device)
        if quantized.data_ptr() != exact.data_ptr():
            return quantized.sub_(exact).to(self._dtype)  # a third copy of a matrix would count
        return (quantized - exact).to(self._dtype)
