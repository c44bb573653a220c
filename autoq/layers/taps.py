"""Putting a function in the place of every quantisable matrix multiplication of a model.

Calibration, scoring and simulation all need the same thing: to see, and to replace, the product
of an input with one weight matrix, wherever the model computes it. For `Linear` and `Conv1D`
that is the module's forward. The fused experts of a mixture layer call
`torch.nn.functional.linear` on slices of one 3-D parameter; those calls are recognised by the
address of the slice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoq.errors import ModelError
from autoq.layers.products import linear
from autoq.models import SlotKind, WeightSlot


@dataclass(frozen=True, slots=True)
class MatrixCall:
    """One product of an input with a slot's matrix, about to happen."""

    slot: WeightSlot
    weight: Tensor  # [out_features, in_features], a view of the parameter
    bias: Tensor | None  # [out_features]
    token_rows: Tensor | None = None  # experts: which token each input row is; None: all in order
    token_count: int = 0  # experts: how many tokens the layer has

    def compute(self, inputs: Tensor) -> Tensor:
        """The product as the model would compute it; inputs [..., in_features]."""
        return nn.functional.linear(inputs, self.weight, self.bias)

    def compute_detached(self, inputs: Tensor) -> Tensor:
        """The same without a graph and, on some CPUs, with sums of another order: faster there."""
        return linear(inputs, self.weight, self.bias)


MatrixHandler: TypeAlias = Callable[[MatrixCall, Tensor], Tensor]
"""Called with a product and its input in the product's place; returns what the model goes on with."""


@contextmanager
def tapped(model: nn.Module, slots: Iterable[WeightSlot], handler: MatrixHandler) -> Iterator[None]:
    """Send every product of an input with one of `slots` through `handler`."""
    remove = install_taps(model, slots, handler)
    try:
        yield
    finally:
        remove()


def install_taps(
    model: nn.Module, slots: Iterable[WeightSlot], handler: MatrixHandler
) -> Callable[[], None]:
    """As `tapped`, until the returned function is called.

    Taps do not add up: of several on one slot only the newest sees its products.
    """
    by_module: dict[str, list[WeightSlot]] = {}
    for slot in slots:
        by_module.setdefault(slot.module, []).append(slot)
    replaced: list[tuple[nn.Module, Callable[..., Any] | None]] = []
    for path, members in by_module.items():
        module = model.get_submodule(path)
        replaced.append((module, vars(module).get("forward")))
        module.forward = _tapped_forward(module, members, handler)
    return partial(_remove_taps, replaced)


def _remove_taps(replaced: Iterable[tuple[nn.Module, Callable[..., Any] | None]]) -> None:
    for module, own_forward in replaced:
        if own_forward is not None:
            module.forward = own_forward
        else:
            # The class's own forward shows again.
            vars(module).pop("forward", None)


def _tapped_forward(
    module: nn.Module, members: list[WeightSlot], handler: MatrixHandler
) -> Callable[..., Any]:
    if members[0].kind is SlotKind.EXPERT:
        return partial(_experts_forward, module, members, handler)
    return partial(_matrix_forward, module, members[0], handler)


def _matrix_forward(
    module: nn.Module, slot: WeightSlot, handler: MatrixHandler, inputs: Tensor
) -> Tensor:
    weight: Tensor = module.weight  # type: ignore[assignment]
    bias: Tensor | None = module.bias  # type: ignore[assignment]
    matrix = weight.t() if slot.kind is SlotKind.CONV1D else weight
    return handler(MatrixCall(slot, matrix, bias), inputs)


def _experts_forward(
    module: nn.Module,
    members: list[WeightSlot],
    handler: MatrixHandler,
    hidden_states: Tensor,
    top_k_index: Tensor,
    *args: Any,
    **kwargs: Any,
) -> Any:
    products = _ExpertProducts(_slices_by_address(module, members), handler, top_k_index)
    with products:
        result = type(module).forward(module, hidden_states, top_k_index, *args, **kwargs)
    if not products.seen and top_k_index.numel():
        raise ModelError(
            f"the experts of {members[0].module} run in an implementation that hides their "
            "products; call model.set_experts_implementation('eager') first"
        )
    return result


def _slices_by_address(
    module: nn.Module, members: Iterable[WeightSlot]
) -> dict[int, tuple[WeightSlot, int]]:
    """Address of an expert's slice -> its slot and the expert's number."""
    return {
        getattr(module, slot.parameter)[slot.expert].data_ptr(): (slot, slot.expert)
        for slot in members
        if slot.expert is not None
    }


class _ExpertProducts(TorchFunctionMode):
    """Recognises products with an expert's slice while the experts' forward runs."""

    def __init__(
        self,
        slices: Mapping[int, tuple[WeightSlot, int]],
        handler: MatrixHandler,
        top_k_index: Tensor,
    ) -> None:
        super().__init__()
        self.seen = False
        self._slices = slices
        self._handler = handler
        self._top_k_index = top_k_index

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.linear and len(args) == 2 and not kwargs:
            inputs, weight = args
            found = self._slices.get(weight.data_ptr())
            if found is not None:
                self.seen = True
                slot, expert = found
                rows = self._token_rows(expert)
                call = MatrixCall(slot, weight, None, rows, self._top_k_index.shape[0])
                return self._handler(call, inputs)
        return function(*args, **kwargs)

    def _token_rows(self, expert: int) -> Tensor:
        """Which tokens an expert sees, in the order of transformers' eager loop.

        The loop walks a mask laid out as [k, tokens].
        """
        return torch.where(torch.eq(self._top_k_index.t(), expert))[1]
