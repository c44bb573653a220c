"""A model folder's weights by their names in the model, for a model that is read block by block."""

from __future__ import annotations

import torch
from torch import Tensor, nn

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

    def read(self, name: str) -> Tensor:
        """The parameter or buffer, in the shape that it has in the model, as it is stored.

        Raises:
            ExportError: it is not there, or cannot be read.
        """
        slots = self._slots.get(name)
        if slots is None:
            return self._matrices.source.tensor(self._stored_name(name))
        if slots[0].kind is SlotKind.EXPERT:
            return torch.stack([self._matrices.matrix(slot) for slot in slots])
        matrix = self._matrices.matrix(slots[0])
        return matrix.t() if slots[0].kind is SlotKind.CONV1D else matrix

    def _stored_name(self, name: str) -> str:
        """Of tensors that are one in the model the checkpoint may hold one name only."""
        stored = self._names[name]
        other = self._names.get(self._tied.get(name, name), stored)
        return other if stored not in self._matrices.source else stored
