"""Not computing again what the first blocks of a model gave before.

Two assignments that agree in the first blocks give the same hidden states there. So the outputs of
blocks are kept, by batch and by what decides them, and a forward pass begins at the first block
whose input is not known. Only what would be computed bit for bit alike is left out.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

_Key: TypeAlias = tuple[Hashable, Hashable]
"""Batch, and what decides the output."""


class PrefixReuse:
    """A model's forward passes, each begun at the first block that is not known yet.

    For models that pass the output of one block to the next, in the order of the list.
    `is_exact` tells whether a model is such.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[str], *, memory_bytes: int) -> None:
        """
        Args:
            blocks: paths of the repeated layers, in the order in which they are computed.
            memory_bytes: bound on everything that is kept; with 0 nothing is.
        """
        self._blocks = [model.get_submodule(path) for path in blocks]
        self._memory_bytes = memory_bytes
        self._outputs: OrderedDict[_Key, Any] = OrderedDict()
        self._preferred: frozenset[Hashable] = frozenset()
        self._bytes_held = 0
        self.blocks_skipped = 0
        self.blocks_seen = 0

    def run(
        self, batch: Hashable, prefixes: Sequence[Hashable], forward: Callable[[], Tensor]
    ) -> Tensor:
        """The model's output.

        Args:
            batch: what tells the model's input from others.
            prefixes: for every block, what decides the outputs of all blocks up to it.
            forward: runs the model on the batch.
        """
        keys = [(batch, prefix) for prefix in prefixes]
        known = self._known(keys)
        self.blocks_seen += len(keys)
        self.blocks_skipped += known
        with self._skipped(keys, known), self._kept(keys, known):
            return forward()

    def prefer(self, prefixes: Sequence[Hashable]) -> None:
        """Keep these outputs before all others, whenever they are there: the next runs begin there.

        Args:
            prefixes: as for `run`, of an assignment that others differ little from.
        """
        self._preferred = frozenset(prefixes)
        for key in [key for key in self._outputs if key[1] in self._preferred]:
            self._outputs.move_to_end(key)

    def clear(self) -> None:
        """Forget everything."""
        self._outputs.clear()
        self._bytes_held = 0

    def _known(self, keys: Sequence[_Key]) -> int:
        """How many blocks need not be computed."""
        for index in reversed(range(len(keys))):
            if keys[index] in self._outputs:
                self._outputs.move_to_end(keys[index])
                return index + 1
        return 0

    @contextmanager
    def _skipped(self, keys: Sequence[_Key], known: int) -> Iterator[None]:
        if not known:
            yield
            return
        # What the earlier ones give is never looked at.
        stored = self._outputs[keys[known - 1]]
        with ExitStack() as stack:
            for block in self._blocks[:known]:
                stack.enter_context(_answering(block, stored))
            yield

    @contextmanager
    def _kept(self, keys: Sequence[_Key], known: int) -> Iterator[None]:
        # The last block's output would serve an equal assignment only.
        with ExitStack() as stack:
            for key, block in list(zip(keys, self._blocks, strict=True))[known:-1]:
                hook = block.register_forward_hook(partial(self._keep, key))
                stack.callback(hook.remove)
            yield

    def _keep(self, key: _Key, _module: nn.Module, _inputs: Any, output: Any) -> None:
        size = _bytes_of(output)
        if not 0 < size <= self._memory_bytes:
            return
        self._drop(key)
        while self._bytes_held + size > self._memory_bytes:
            oldest = next(iter(self._outputs))
            if oldest[1] in self._preferred and key[1] not in self._preferred:
                return
            self._drop(oldest)
        self._outputs[key] = output
        self._bytes_held += size

    def _drop(self, key: _Key) -> None:
        if key in self._outputs:
            self._bytes_held -= _bytes_of(self._outputs.pop(key))


def is_exact(model: nn.Module, blocks: Sequence[str], forward: Callable[[], Tensor]) -> bool:
    """Whether beginning at any block gives the same bits as the whole forward pass, every time.

    Not so where blocks are computed in another order, more than once, or from more than the
    output of the one before, or where somebody writes into it.
    """
    if len(blocks) < 2:
        return False
    whole = forward()
    reuse = PrefixReuse(model, blocks, memory_bytes=1 << 62)
    if not torch.equal(whole, reuse.run(0, range(len(blocks)), forward)):
        return False
    twice = {1, len(blocks) // 2, len(blocks) - 1}  # the first use may have changed what is kept
    for known, use in product(range(1, len(blocks)), range(2)):
        if use and known not in twice:
            continue
        rest = [(known, use, later) for later in range(known, len(blocks))]
        if not torch.equal(whole, reuse.run(0, [*range(known), *rest], forward)):
            return False
    return True


@contextmanager
def _answering(block: nn.Module, output: Any) -> Iterator[None]:
    """The block gives `output`, whatever it is called with."""
    own = vars(block).get("forward")
    block.forward = lambda *_args, **_kwargs: output
    try:
        yield
    finally:
        if own is None:
            del block.forward
        else:
            block.forward = own


def _bytes_of(output: Any) -> int:
    if isinstance(output, Tensor):
        return output.numel() * output.element_size()
    if isinstance(output, tuple | list):
        return sum(map(_bytes_of, output))
    return 0
