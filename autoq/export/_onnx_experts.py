"""Experts of mixture layers in an ONNX graph: all of them read every token.

Which expert reads which token is not known when a graph is traced. So each expert is computed for
all tokens and counts as much as the router says, nothing where it was not chosen: exactly what the
model computes, for (experts / chosen experts) times its products. Codes are stored as they are
searched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autoq.layers.taps import MatrixCall, MatrixHandler
from autoq.models import SlotKind, WeightSlot

_FIRST, _LAST = "gate_up_proj", "down_proj"

Slots: TypeAlias = Mapping[tuple[str, int], WeightSlot]
"""Parameter and expert -> slot."""


def dense_refusal(module: nn.Module) -> str | None:
    """Why a layer's experts cannot be computed for all tokens; None if they can."""
    known: Any = module
    says = {
        "has_gate": True,
        "has_bias": False,
        "is_transposed": False,
        "has_post_expert_norm": False,
    }
    is_known = all(getattr(known, name, None) is value for name, value in says.items())
    shapes = [getattr(getattr(known, name, None), "ndim", 0) for name in (_FIRST, _LAST)]
    if is_known and shapes == [3, 3]:
        return None
    return f"how {type(module).__name__} computes an expert is not known to autoq"


@contextmanager
def dense_experts(
    model: nn.Module, slots: Iterable[WeightSlot], product: MatrixHandler
) -> Iterator[None]:
    """Let every expert of a layer whose way is known read every token, for a while.

    Args:
        slots: those of kind EXPERT go through `product`, and other experts are multiplied with.
    """
    by_module: dict[str, dict[tuple[str, int], WeightSlot]] = {}
    for slot in slots:
        if slot.kind is SlotKind.EXPERT and slot.expert is not None:
            by_module.setdefault(slot.module, {})[slot.parameter, slot.expert] = slot
    # Quantised or not: a loop over the experts that were chosen cannot be traced.
    modules = {path: one for path, one in model.named_modules() if dense_refusal(one) is None}
    try:
        for path, module in modules.items():
            module.forward = partial(_forward, module, by_module.get(path, {}), product)
        yield
    finally:
        for module in modules.values():
            vars(module).pop("forward", None)


def _forward(
    module: nn.Module,
    slots: Slots,
    product: MatrixHandler,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
) -> Tensor:
    """What the layer gives: hidden_states [tokens, hidden], the others [tokens, chosen]."""
    gate: Callable[[Tensor], Tensor] = module._apply_gate  # type: ignore[assignment]
    total = torch.zeros_like(hidden_states)
    for expert in range(len(getattr(module, _FIRST))):
        inner = gate(_product(module, slots, product, _FIRST, expert, hidden_states))
        out = _product(module, slots, product, _LAST, expert, inner)
        chosen = torch.where(top_k_index == expert, top_k_weights, 0.0)
        total = total + out * chosen.sum(-1, keepdim=True)
    return total


def _product(
    module: nn.Module,
    slots: Slots,
    product: MatrixHandler,
    parameter: str,
    expert: int,
    inputs: Tensor,
) -> Tensor:
    weight = getattr(module, parameter)[expert]
    slot = slots.get((parameter, expert))
    if slot is None:
        return nn.functional.linear(inputs, weight)
    return product(MatrixCall(slot, weight, None), inputs)
