"""Gradient checkpointing over chosen blocks, whatever the model and its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint


class ActivationBudget:
    """Memory in which blocks may keep what backward needs, instead of computing it again.

    The last blocks of the model get it: backward comes to them first, so it is free again when the
    others compute their insides anew, and the two never add up.

    What a block keeps is measured once for every kind of block and shape of input, by running it
    and throwing the result away; so the bound holds from the first batch on.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._left = limit_bytes
        self._sizes: dict[tuple[object, ...], int] = {}
        self.measures = False  # while a block runs to be thrown away, for what it would keep
        self._needs: list[int] = []  # of every block, in the order in which they ran last
        self._run = 0

    def renew(self, blocks: int) -> None:
        """All of it is free again: another forward begins, which runs so many blocks."""
        self._left = self._limit
        self._needs += [0] * (blocks - len(self._needs))
        self._run = 0

    def takes(self, block: nn.Module, forward: Callable[[], Any], arguments: Iterable[Any]) -> bool:
        """Whether the block's activations fit, and those of all after it; if so they are booked.

        Args:
            forward: runs the block on the arguments.
        """
        if not self._limit:
            return False
        shapes = tuple(tuple(a.shape) for a in arguments if isinstance(a, Tensor))
        # Blocks of one class may differ in their parts, as dense and mixture layers do, and in
        # their widths.
        parts = tuple(type(part) for part in block.modules())
        kind = (type(block), parts, tuple(p.shape for p in block.parameters()), shapes)
        if kind not in self._sizes:
            self.measures = True
            try:
                self._sizes[kind] = _kept_bytes(block, forward)
            finally:
                self.measures = False
        return self._books(self._sizes[kind])

    def _books(self, needed: int) -> bool:
        position = self._run
        self._run += 1
        if position < len(self._needs):
            self._needs[position] = needed
        # Of a block that never ran nothing better is known than what this one needs.
        later = sum(size or needed for size in self._needs[position + 1 :])
        if needed + later > self._limit or needed > self._left:
            return False
        self._left -= needed
        return True


def _kept_bytes(block: nn.Module, forward: Callable[[], Any]) -> int:
    """What one run of the block keeps for backward, its own parameters aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in block.parameters()}
    kept: list[Tensor] = []  # all alive until counted, or addresses would come twice

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.detach())
        return kept[-1]

    with saved_tensors_hooks(pack, _unchanged):
        forward()
    sizes = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    return sum(size for address, size in sizes.items() if address not in own)


def _unchanged(tensor: Tensor) -> Tensor:
    return tensor


@contextmanager
def checkpointed_blocks(
    model: nn.Module, blocks: Iterable[str], budget: ActivationBudget | None = None
) -> Iterator[None]:
    """Keep only the blocks' inputs for backward and compute their insides again there.

    Holds while gradients are enabled, in train and in eval mode, unlike transformers' own switch,
    which needs train mode. Hooks inside a block run twice: in the forward and again in the
    backward. The models are as before when the context ends; run backward inside it.

    Args:
        model: the model whose submodules are wrapped.
        blocks: paths of the repeated layers, as in `ModelMap.blocks`.
        budget: blocks that fit into it, the last ones, keep their insides after all: no result
            changes, and nothing is computed twice.
    """
    paths = list(blocks)
    if budget is not None:
        budget.renew(len(paths))
    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(_checkpointed(model.get_submodule(path), budget))
        yield


@contextmanager
def _checkpointed(block: nn.Module, budget: ActivationBudget | None) -> Iterator[None]:
    had_own_forward = "forward" in vars(block)
    original = block.forward
    block.forward = _recomputing(block, original, budget)
    try:
        yield
    finally:
        if had_own_forward:
            block.forward = original
        else:
            del block.forward


def _recomputing(
    block: nn.Module, forward: Callable[..., Any], budget: ActivationBudget | None
) -> Callable[..., Any]:
    # wraps() keeps the signature, which transformers inspects.
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # A throw-away run would draw random numbers, which train mode needs for itself.
        if budget is not None and not block.training:
            everything = (*args, *kwargs.values())
            if budget.takes(block, partial(forward, *args, **kwargs), everything):
                return forward(*args, **kwargs)
        # Random numbers are drawn in train mode only (dropout); then both passes must draw alike.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=block.training, **kwargs
        )

    return run
