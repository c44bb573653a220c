"""The plan of a model that is not in memory, as an export of the whole model writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from autoq.export._names import checkpoint_tensors, unquantized_groups
from autoq.export.streaming import GROUP_BYTES, SourceTensors, StreamedPlan


@dataclass(frozen=True)
class OrderedStreamedPlan(StreamedPlan):
    """A streamed plan with the tensors that the model has, in the model's order.

    So its files are those of an export of the model in memory, byte for byte: what a folder holds
    beyond the model's own tensors is left away, such as a second copy of a tied head.
    """

    def unquantized_groups(self) -> Iterator[Mapping[str, Tensor]]:
        """Name -> tensor for everything that is stored as it is, read when it is asked for.

        Raises:
            ExportError: when a tensor is read that the folder keeps in another arrangement.
        """
        for group in unquantized_groups(self.model, self.model_map, self.quantized_slots):
            for names in self._in_pieces(checkpoint_tensors(self.model, group)):
                yield UnreadTensors(self.matrices.source, names)

    def _in_pieces(self, tensors: Mapping[str, Tensor]) -> Iterator[list[str]]:
        """The names in order, in lists of about `GROUP_BYTES`."""
        piece: list[str] = []
        size = 0
        for name, tensor in tensors.items():
            if piece and size + tensor.nbytes > GROUP_BYTES:
                yield piece
                piece, size = [], 0
            piece.append(name)
            size += tensor.nbytes
        if piece:
            yield piece


class UnreadTensors(Mapping[str, Tensor]):
    """Tensors of a source by name, read whenever they are looked up."""

    def __init__(self, source: SourceTensors, names: list[str]) -> None:
        self._source, self._names = source, names

    def __getitem__(self, name: str) -> Tensor:
        return self._source.tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
