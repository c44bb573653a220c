"""The plan of a model that is not in memory, as an export of the whole model writes it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor

from autoq.export._names import checkpoint_tensors
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
        for group in self._model_groups():
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

    def _model_groups(self) -> list[dict[str, Tensor]]:
        """As `_names.unquantized_groups`: a block each, and the rest where its first tensor stands."""
        quantized = {f"{slot.module}.{slot.parameter}" for slot in self.quantized_slots}
        taken = quantized | self._tied_copies()
        groups: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self.model.state_dict().items():
            if name not in taken:
                groups.setdefault(self._block_of(name), {})[name] = tensor
        return list(groups.values())

    def _block_of(self, name: str) -> str:
        blocks = self.model_map.blocks
        return next((block for block in blocks if name.startswith(f"{block}.")), "")

    def _tied_copies(self) -> set[str]:
        """On the meta device no tensor has an address, so copies are told by the parameter."""
        tied = set(getattr(self.model, "all_tied_weights_keys", None) or {})
        named = dict(self.model.named_parameters(remove_duplicate=False))
        owners: dict[int, str] = {}
        copies: set[str] = set()
        for name in sorted(named, key=lambda key: key in tied):
            if owners.setdefault(id(named[name]), name) != name:
                copies.add(name)
        return copies


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
