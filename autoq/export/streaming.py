"""Quantising a model folder tensor by tensor, without ever holding the model.

The model exists on torch's meta device, for its names and shapes only; matrices are read from the
source when they are quantised, and written a shard at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from autoq.calibration.scales import scaled_weight_amax, sharing_sets
from autoq.errors import ExportError, ModelError
from autoq.export._folding import fold, folded_scales
from autoq.export._names import CheckpointNames, renamed_tensors
from autoq.export._plan import ExportPlan, checkpoint_names
from autoq.formats import FORMATS, NONE, Calibration, FormatName, QuantFormat
from autoq.layers import LayerCalibration
from autoq.models import ModelMap, SlotKind, SlotName, WeightSlot
from autoq.models.folder import shard_paths

GROUP_BYTES = 64 << 20
"""Unquantised tensors are copied in groups of about this size."""


class SourceTensors:
    """The tensors of a model folder, read one by one.

    Each read opens its file anew: pages of a mapped file count as the process's memory for as long
    as the file is open.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ModelError: the folder has no weights, or a file of them is damaged.
        """
        self._folder = folder
        self._files: dict[str, Path] = {}
        self._bytes: dict[str, int] = {}
        for shard in shard_paths(folder):
            try:
                self._take_names(shard)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{shard} is damaged: {error}; fetch it again") from error

    def _take_names(self, shard: Path) -> None:
        with safe_open(shard, framework="pt") as file:
            names = list(file.keys())
            for name in names:
                self._files[name] = shard
                self._bytes[name] = _stored_bytes(file.get_slice(name))

    @property
    def names(self) -> list[str]:
        """Every tensor of the folder, in the order of its files."""
        return list(self._files)

    def stored_bytes(self, name: str) -> int:
        """What a tensor takes."""
        return self._bytes[name]

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str) -> Tensor:
        """One tensor, as a view of its mapped file, which is unmapped with it.

        Raises:
            ExportError: the folder has none of that name, or its file cannot be read.
        """
        if name not in self._files:
            raise ExportError(
                f"{self._folder} has no tensor {name}: its files keep this layer in another "
                "arrangement than one matrix by name; search the model and export that"
            )
        try:
            with safe_open(self._files[name], framework="pt") as file:
                stored: Tensor = file.get_tensor(name)
                return stored
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{self._files[name]} cannot be read: {error}") from error


def _stored_bytes(piece: object) -> int:
    shape = piece.get_shape()  # type: ignore[attr-defined]
    dtype: str = piece.get_dtype()  # type: ignore[attr-defined]
    digits = "".join(letter for letter in dtype.partition("_")[0] if letter.isdecimal())
    bits = int(digits) if digits else 8  # BOOL
    count = 1
    for size in shape:
        count *= size
    return count * bits // 8


class SourceMatrices:
    """The slots' weights, read from a model folder whenever they are asked for."""

    def __init__(self, source: SourceTensors, names: CheckpointNames) -> None:
        self.source, self._names = source, names

    @classmethod
    def of(cls, folder: Path, model: nn.Module, model_map: ModelMap) -> SourceMatrices:
        """Those of a model's folder.

        Raises:
            ExportError: a module's weight is not one tensor in the checkpoint.
            ModelError: how the experts are spelled is not known, or the folder is no whole model.
        """
        return cls(SourceTensors(folder), checkpoint_names(model, model_map))

    def tensor_names(self, slot: WeightSlot) -> list[str]:
        """The tensors that hold the slot's rows, in order."""
        return [f"{part.module}.weight" for part in self._names.parts(slot.name)]

    def matrix(self, slot: WeightSlot) -> Tensor:
        """The slot's weight [out_features, in_features].

        Raises:
            ExportError: a part is missing, or has another shape than the architecture says.
        """
        parts = [self.source.tensor(name) for name in self.tensor_names(slot)]
        if slot.kind is SlotKind.CONV1D:
            parts = [part.t() for part in parts]
        matrix = parts[0] if len(parts) == 1 else torch.cat(parts)
        expected = (slot.out_features, slot.in_features)
        if tuple(matrix.shape) != expected:
            raise ExportError(
                f"{slot.name} must have shape {expected} by config.json, and the files have "
                f"{tuple(matrix.shape)}; they do not belong together"
            )
        return matrix


@dataclass(frozen=True)
class StreamedPlan(ExportPlan):
    """An export plan whose model is on the meta device, and its weights in a folder."""

    matrices: SourceMatrices

    def matrix(self, slot: WeightSlot) -> Tensor:
        """The slot's weight [out_features, in_features], read from the folder."""
        return self.matrices.matrix(slot)

    def unquantized_groups(self) -> Iterator[Mapping[str, Tensor]]:
        """Name -> tensor for everything that is stored as it is, read when it is asked for."""
        source = self.matrices.source
        taken = {name for slot in self.quantized_slots for name in self.matrices.tensor_names(slot)}
        group: list[str] = []
        size = 0
        for name in source.names:
            if name in taken:
                continue
            group.append(name)
            size += source.stored_bytes(name)
            if size >= GROUP_BYTES:
                yield _Unread(source, group)
                group, size = [], 0
        if group:
            yield _Unread(source, group)

    def folded(self, group: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """The tensors under their names, which are the checkpoint's already, scales in the norms.

        Raises:
            ExportError: a norm's product with its scale leaves the range of the norm's dtype.
        """
        pairs = {name: fold(name, tensor, self._folds) for name, tensor in group.items()}
        for name, (tensor, is_folded) in pairs.items():
            scale = self._folds[name.rpartition(".")[0]][1] if is_folded else None
            if scale is not None and not torch.equal(tensor.float() / scale, group[name].float()):
                raise ExportError(
                    f"the AWQ scale must fold into {name} exactly, and the product leaves the "
                    f"range of {str(tensor.dtype).removeprefix('torch.')}; use another format"
                )
        tensors = {name: tensor for name, (tensor, _) in pairs.items()}
        return tensors, sum(is_folded for _, is_folded in pairs.values())

    @cached_property
    def _folds(self) -> Mapping[str, tuple[SlotName, Tensor]]:
        """Norm in the checkpoint -> the first slot that folds into it, and the scale."""
        folds = folded_scales(self.slot_formats, self.calibration)
        if not folds:
            return {}
        names = renamed_tensors(self.model, [f"{norm}.weight" for norm in folds])
        return {
            names[f"{norm}.weight"].removesuffix(".weight"): folded
            for norm, folded in folds.items()
        }


class _Unread(Mapping[str, Tensor]):
    """Tensors of a source by name, read whenever they are looked up."""

    def __init__(self, source: SourceTensors, names: list[str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class WeightOnlyCalibration(Mapping[tuple[SlotName, FormatName], LayerCalibration]):
    """What can be known of layers from their weights alone.

    Every input channel counts the same in the choice of block scales. Formats whose input scale is
    stored cannot be had in this way. Where matrices share a top-level scale, all of them are read
    once when this is made.
    """

    def __init__(
        self,
        matrices: SourceMatrices,
        model_map: ModelMap,
        slot_formats: Mapping[SlotName, FormatName],
        *,
        method: Calibration,
        scale_dtype: torch.dtype,
    ) -> None:
        """
        Raises:
            ModelError: a weight holds NaN or infinity; names it.
        """
        self._matrices, self._slots = matrices, model_map.slots
        self._formats = {slot: name for slot, name in slot_formats.items() if name != NONE}
        self._method, self._scale_dtype = method, scale_dtype
        self._amax: dict[SlotName, float] = {}
        for group in model_map.groups:
            for members in sharing_sets(group):
                self._amax.update(dict.fromkeys(members, self._largest(members)))

    def __getitem__(self, key: tuple[SlotName, FormatName]) -> LayerCalibration:
        slot, name = key
        if self._formats.get(slot) != name:
            raise KeyError(key)
        return LayerCalibration(
            weight_amax=self._amax[slot],
            input_amax=0.0,
            importance=self._importance(self._slots[slot], FORMATS[name]),
        )

    def __iter__(self) -> Iterator[tuple[SlotName, FormatName]]:
        return iter(self._formats.items())

    def __len__(self) -> int:
        return len(self._formats)

    def _importance(self, slot: WeightSlot, fmt: QuantFormat) -> Tensor | None:
        if not fmt.algorithm(self._method).weighs_errors:
            return None
        return torch.ones(slot.in_features)

    def _largest(self, members: tuple[SlotName, ...]) -> float:
        """Over the matrices that share their top-level scale, one in memory at a time."""
        name = self._formats.get(members[0], NONE)
        if not FORMATS[name].tensor_scale_bits:
            return 0.0  # there is no such scale
        return max(self._amax_of(self._slots[member], FORMATS[name]) for member in members)

    def _amax_of(self, slot: WeightSlot, fmt: QuantFormat) -> float:
        weight, importance = self._matrices.matrix(slot), self._importance(slot, fmt)
        amax = scaled_weight_amax([weight], None, fmt, self._scale_dtype, importance)
        if not math.isfinite(amax):
            raise ModelError(
                f"weights must be finite, and {slot.name} has NaN or infinity; restore the weights "
                "from a good copy, or exclude the layer"
            )
        return amax
