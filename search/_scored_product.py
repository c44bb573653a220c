"""Running a model so that backward shows every slot's product to an observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from autoq.layers.taps import MatrixCall, MatrixHandler, tapped
from autoq.models import ModelMap
from autoq.models.checkpointing import ActivationBudget, checkpointed_blocks

Observer: TypeAlias = Callable[[MatrixCall, Tensor, Tensor, Tensor], None]


class ScoredProduct(torch.autograd.Function):
    """inputs @ weight.T + bias, whose backward also shows inputs and gradients to an observer.

    The inputs travel through the saved tensors, so that activation checkpointing frees and
    recomputes them like any other.
    """

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, call: MatrixCall, observe: Observer) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.call = call
        ctx.observe = observe
        return call.compute(inputs)

    @staticmethod
    def backward(ctx: Any, output_gradient: Tensor) -> tuple[Tensor, None, None]:
        (inputs,) = ctx.saved_tensors
        input_gradient = output_gradient @ ctx.call.weight
        ctx.observe(
            ctx.call,
            inputs.flatten(0, -2),
            output_gradient.flatten(0, -2),
            input_gradient.flatten(0, -2),
        )
        return input_gradient, None, None


@contextmanager
def scoring_mode(
    model: nn.Module,
    model_map: ModelMap,
    handler: MatrixHandler,
    activations: ActivationBudget | None = None,
) -> Iterator[None]:
    """Gradients to activations only, every slot's product in `handler`.

    Blocks are checkpointed, those aside that fit into `activations`.
    """
    with ExitStack() as stack:
        stack.enter_context(_frozen_parameters(model))
        stack.enter_context(tapped(model, model_map.slots.values(), handler))
        stack.enter_context(checkpointed_blocks(model, model_map.blocks, activations))
        stack.enter_context(torch.enable_grad())
        yield


@contextmanager
def _frozen_parameters(model: nn.Module) -> Iterator[None]:
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in required:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
