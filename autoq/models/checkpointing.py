"""Gradient checkpointing over chosen blocks, whatever the model and its mode."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


@contextmanager
def checkpointed_blocks(model: nn.Module, blocks: Iterable[str]) -> Iterator[None]:
    """Keep only the blocks' inputs for backward and compute their insides again there.

    Holds while gradients are enabled, in train and in eval mode, unlike transformers' own switch,
    which needs train mode. Hooks inside a block run twice: in the forward and again in the
    backward. The models are as before when the context ends; run backward inside it.

    Args:
        model: the model whose submodules are wrapped.
        blocks: paths of the repeated layers, as in `ModelMap.blocks`.
    """
    with ExitStack() as stack:
        for path in blocks:
            stack.enter_context(_checkpointed(model.get_submodule(path)))
        yield


@contextmanager
def _checkpointed(block: nn.Module) -> Iterator[None]:
    had_own_forward = "forward" in vars(block)
    original = block.forward
    block.forward = _recomputing(block, original)
    try:
        yield
    finally:
        if had_own_forward:
            block.forward = original
        else:
            del block.forward


def _recomputing(block: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    # wraps() keeps the signature, which transformers inspects.
    @wraps(forward)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        # Random numbers are drawn in train mode only (dropout); then both passes must draw alike.
        return checkpoint(
            forward, *args, use_reentrant=False, preserve_rng_state=block.training, **kwargs
        )

    return run
