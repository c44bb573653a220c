"""The original model's outputs, computed once for everything that is measured beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from autoq.evaluators.fidelity import paired_outputs

MEMORY_BYTES = 1 << 30


class ReferenceOutputs:
    """Outputs of the original on some batches, for any number of changed models.

    If all of them fit into the bound they are computed once. Otherwise half of the bound holds the
    outputs of the first batches for good, and the rest is computed again for each model. They are
    kept as the model gave them, bit for bit: as log-probabilities in float32 those of a bfloat16
    model would take twice the memory, and the logarithm is a few per cent of measuring.
    """

    def __init__(
        self, batches: Sequence[Tensor], *, bytes_per_batch: int, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        """
        Args:
            batches: token ids, int64 [sequences, tokens] each.
            bytes_per_batch: what one batch's output takes.
            memory_bytes: bound on the outputs held at once.
        """
        room = memory_bytes // max(bytes_per_batch, 1)
        kept = len(batches) if room >= len(batches) else room // 2
        self._first, self._rest = batches[:kept], batches[kept:]
        self._bytes_per_batch = bytes_per_batch
        self._memory_left = memory_bytes - kept * bytes_per_batch
        self._kept: list[Tensor] | None = None

    def pairs(
        self,
        reference: Callable[[Sequence[Tensor]], list[Tensor]],
        changed: Callable[[Tensor], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(token ids, original output, changed output) of every batch, in order.

        Args:
            reference: runs the original on several batches; called for those that are not held.
            changed: runs the changed model on one batch.
        """
        if self._kept is None:
            self._kept = reference(self._first) if self._first else []
        for ids, expected in zip(self._first, self._kept, strict=True):
            yield ids, expected, changed(ids)
        yield from paired_outputs(
            self._rest,
            reference,
            changed,
            bytes_per_batch=self._bytes_per_batch,
            memory_bytes=self._memory_left,
        )
