"""A model folder's weights by their names in the model, for a model that is read block by block."""

from __future__ import annotations

from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.export._names import renamed_tensors, tied_parameters
from autoq.export.streaming import SourceMatrices
from autoq.models import ModelMap, SlotKind, WeightSlot


class FolderWeights:
    """See `autoq.models.block_stream.StoredWeights`."""

    def __init__(self, model: nn.Module, model_map: ModelMap, matrices: SourceMatrices) -> None:
        """
        Args:
            model: on the meta device, as it was made.
        Raises:
            ExportError: a tensor has no name of its own in the checkpoint.
        """
        self._matrices = matrices
        self._slots: dict[str, list[WeightSlot]] = {}
        for slot in model_map.slots.values():
            self._slots.setdefault(f"{slot.module}.{slot.parameter}", []).append(slot)
        names = [name for name in model.state_dict() if name not in self._slots]
        self._names = renamed_tensors(model, names)
        self._tied = tied_parameters(model)
        self._parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}

    def missing(self) -> list[str]:
        """Tensors that hold the model's parameters, and that the folder lacks."""
        wanted = [self._stored_name(name) for name in self._names if name in self._parameters]
        for slots in self._slots.values():
            wanted += [name for slot in slots for name in self._matrices.tensor_names(slot)]
        return [name for name in dict.fromkeys(wanted) if name not in self._matrices.source]

    def read_into(self, name: str, target: Tensor) -> None:
        """Copy a parameter or buffer, in the shape that it has in the model; experts one by one.

        Raises:
            ModelError: it has another shape than the architecture says.
            ExportError: it is not there, or cannot be read.
        """
        slots = self._slots.get(name)
        if slots is not None and slots[0].kind is SlotKind.EXPERT:
            for slot in slots:
                target[slot.expert].copy_(self._matrices.matrix(slot))
            return
        stored = self._stored(name)
        if stored.shape != target.shape:
            raise ModelError(
                f"{name} must have shape {tuple(target.shape)} by config.json, and the files have "
                f"{tuple(stored.shape)}; they do not belong together"
            )
        target.copy_(stored)

    def rows(self, name: str, wanted: Tensor) -> Tensor:
        """Some rows of a parameter, as they are stored; `wanted` is int64 [rows].

        Raises:
            ExportError: it is not there, or cannot be read.
        """
        return self._stored(name)[wanted]

    def _stored(self, name: str) -> Tensor:
        slots = self._slots.get(name)
        if slots is None:
            return self._matrices.source.tensor(self._stored_name(name))
        matrix = self._matrices.matrix(slots[0])
        return matrix.t() if slots[0].kind is SlotKind.CONV1D else matrix

    def _stored_name(self, name: str) -> str:
        """Of tensors that are one in the model the checkpoint may hold one name only."""
        stored = self._names[name]
        other = self._names.get(self._tied.get(name, name), stored)
        return other if stored not in self._matrices.source else stored
