"""How many bytes a checkpoint's tensors take, before it is written."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from autoq.export._folding import Calibrations
from autoq.export._layouts import LAYOUTS
from autoq.export._names import checkpoint_tensors, tied_copies, unquantized_groups
from autoq.export._packing import packed_tensors
from autoq.export._plan import ExportPlan
from autoq.export._source import storage_dtypes
from autoq.formats import FORMATS, LOW_RANK_ELEMENT_BITS, NONE, FormatName, WeightScaling
from autoq.layers import LayerCalibration
from autoq.layers.quantize import Container, quantize_weight
from autoq.models import GroupName, ModelMap, SlotKind, SlotName, WeightSlot
from autoq.search.costs import StoredSizes

_BITS_PER_BYTE = 8
_PROBE_ROWS = (16, 32)
"""Rows of the matrices that are packed to see what a row takes; every format packs so many, and no
block of rows has fewer."""

_PROBE_CALIBRATION = LayerCalibration(weight_amax=1.0, input_amax=1.0)


def stored_sizes(
    model: nn.Module,
    model_map: ModelMap,
    formats: Sequence[FormatName],
    *,
    container: Container,
    scale_dtype: torch.dtype,
    source: Path | None,
    calibration: Calibrations,
) -> StoredSizes:
    """The bytes of every group in every format, and of all tensors that are not searched.

    They are those of `export_checkpoint`: small matrices go through the container's own packers,
    and what is left alone is counted in the dtypes that the model is stored in, shared tensors
    once.

    Args:
        formats: `none` is always counted, named or not.
        scale_dtype: dtype in which the model is stored.
        source: the model's folder, for tensors that it stores in another dtype; None without one.
        calibration: says which input scales are written; where it is empty, none are.
    """
    dtypes = storage_dtypes(source) if source is not None else {}
    counter = _Counter(model, model_map, container, scale_dtype, dtypes, calibration)
    quantised = [name for name in formats if (container, name) in LAYOUTS]
    cells: dict[GroupName, dict[FormatName, int]] = {}
    for group in model_map.groups:
        slots = [model_map.slots[name] for name in group.slots]
        cells[group.name] = {
            fmt: sum(counter.quantised_bits(slot, fmt) for slot in slots)
            for fmt in quantised
            if not any(FORMATS[fmt].refusal(s.out_features, s.in_features) for s in slots)
        }
        cells[group.name][NONE] = sum(counter.plain_bits(slot) for slot in slots)
    return StoredSizes(cells=cells, fixed_bytes=counter.fixed_bytes())


@dataclass(frozen=True, slots=True)
class _Taken:
    """Bytes that a module takes: for each row, for each row of blocks, and once."""

    each_row: int
    each_row_of_blocks: int
    once: int
    block_height: int | None  # rows of a block; None where scales are not of several rows

    def by(self, rows: int) -> int:
        """Bytes of so many rows."""
        blocks = -(-rows // self.block_height) if self.block_height else 0
        return rows * self.each_row + blocks * self.each_row_of_blocks + self.once


@dataclass(frozen=True)
class _Counter:
    model: nn.Module
    model_map: ModelMap
    container: Container
    scale_dtype: torch.dtype
    dtypes: Mapping[str, torch.dtype]  # of the source's tensors
    calibration: Calibrations
    plans: dict[FormatName, ExportPlan] = field(default_factory=dict)
    taken: dict[tuple[FormatName, int, SlotKind], _Taken] = field(default_factory=dict)

    def quantised_bits(self, slot: WeightSlot, fmt: FormatName) -> int:
        """Everything that is written for a slot in a format."""
        plan = self._plan(fmt)
        parts = plan.names.parts(slot.name)
        taken = self._taken(slot, fmt)
        rank = FORMATS[fmt].branch_rank(slot.out_features, slot.in_features)
        size = sum(
            taken.by(part.rows) + branch_bytes(part.rows, slot.in_features, rank) for part in parts
        )
        if (slot.name, fmt) in self.calibration:
            scale = plan.written_pre_quant_scale(slot, self.calibration[slot.name, fmt])
            if scale is not None:
                size += len(parts) * scale.numel() * self.scale_dtype.itemsize
        return size * _BITS_PER_BYTE

    def plain_bits(self, slot: WeightSlot) -> int:
        """What a slot takes that is left as it is; a shared tensor counts for its owner."""
        if f"{slot.module}.{slot.parameter}" in self._copies:
            return 0
        parts = self._plan(NONE).names.parts(slot.name)
        return sum(
            part.rows
            * slot.in_features
            * self.dtypes.get(f"{part.module}.weight", self.scale_dtype).itemsize
            * _BITS_PER_BYTE
            for part in parts
        )

    def fixed_bytes(self) -> int:
        """Every tensor that no slot is."""
        slots = self.model_map.slots.values()
        groups = unquantized_groups(self.model, self.model_map, slots)
        return sum(self._plain_bytes(group) for group in groups)

    def _plain_bytes(self, tensors: Mapping[str, Tensor]) -> int:
        # On the meta device, as renaming can mean to split and to join.
        shapes = {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}
        return sum(
            tensor.numel() * self._dtype(name, tensor).itemsize
            for name, tensor in checkpoint_tensors(self.model, shapes).items()
        )

    def _dtype(self, name: str, tensor: Tensor) -> torch.dtype:
        if not tensor.is_floating_point():
            return tensor.dtype
        return self.dtypes.get(name, self.scale_dtype)

    @cached_property
    def _copies(self) -> set[str]:
        return tied_copies(self.model)

    def _plan(self, fmt: FormatName) -> ExportPlan:
        if fmt not in self.plans:
            slot_formats: dict[SlotName, FormatName] = dict.fromkeys(self.model_map.slots, fmt)
            self.plans[fmt] = ExportPlan(
                self.model,
                self.model_map,
                slot_formats,
                self.calibration,
                self.container,
                self.scale_dtype,
            )
        return self.plans[fmt]

    def _taken(self, slot: WeightSlot, fmt: FormatName) -> _Taken:
        key = (fmt, slot.in_features, slot.kind)
        if key not in self.taken:
            few, many = _PROBE_ROWS
            size = self._packed_bytes(few, slot, fmt)
            each_row = (self._packed_bytes(many, slot, fmt) - size) // (many - few)
            height, each_block = None, 0
            if FORMATS[fmt].weight_scaling is WeightScaling.BLOCK:
                height = FORMATS[fmt].weight_block_size
                assert height is not None
                two_blocks = self._packed_bytes(height + few, slot, fmt)
                each_block = two_blocks - size - height * each_row
            once = size - few * each_row - each_block
            self.taken[key] = _Taken(each_row, each_block, once, height)
        return self.taken[key]

    def _packed_bytes(self, rows: int, slot: WeightSlot, fmt: FormatName) -> int:
        weight = quantize_weight(
            torch.zeros(rows, slot.in_features),
            FORMATS[fmt],
            _PROBE_CALIBRATION,
            scale_dtype=self.scale_dtype,
        )
        tensors = packed_tensors(
            weight,
            _PROBE_CALIBRATION,
            first_row=0,
            rows=rows,
            container=self.container,
            kind=slot.kind,
            storage_dtype=self.scale_dtype,
        )
        rank = FORMATS[fmt].branch_rank(rows, slot.in_features)
        branch = branch_bytes(rows, slot.in_features, rank)  # which does not grow by the row
        return sum(tensor.nbytes for tensor in tensors.values()) - branch


def branch_bytes(rows: int, columns: int, rank: int) -> int:
    """Bytes of the factors of a branch of low rank, written beside so many rows of a matrix."""
    return rank * (rows + columns) * LOW_RANK_ELEMENT_BITS // _BITS_PER_BYTE
