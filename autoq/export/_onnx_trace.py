"""From a transformers model to an ONNX graph in float32, quantised products left open.

torch's exporter writes everything but the quantised products. In the place of each stands a node
`Product` of the domain `autoq`, with the slot's name, the input as the model has it, and no weight.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn

from autoq.errors import ExportError
from autoq.export._folding import fold, folded_scales
from autoq.export._onnx_experts import dense_experts
from autoq.export._onnx_interface import AsGraph, Interface
from autoq.export._plan import ExportPlan
from autoq.layers.taps import MatrixCall, tapped
from autoq.models import SlotKind
from autoq.models.loading import quiet_transformers

OPSET = 21
"""The first with INT4 and with blocks in QuantizeLinear and DequantizeLinear."""

PRODUCT_DOMAIN, PRODUCT, SLOT = "autoq", "Product", "slot"


def traced(plan: ExportPlan, interface: Interface) -> ir.Model:
    """The graph of the plan's model, with the interface's inputs and outputs; sizes are dynamic.

    Raises:
        ExportError: torch cannot trace the model.
    """
    model, example, dynamic = plan.model, interface.example, interface.dynamic
    slots = plan.quantized_slots
    others = [slot for slot in slots if slot.kind is not SlotKind.EXPERT]
    with (
        in_float32(model, _replacements(plan)),
        tapped(model, others, _open_product),
        dense_experts(model, slots, _open_product),
        _quiet(),
    ):
        try:
            program = torch.onnx.export(
                AsGraph(interface),
                tuple(example.values()),
                dynamo=True,
                verbose=False,
                opset_version=OPSET,
                input_names=list(interface.inputs),
                output_names=list(interface.outputs),
                dynamic_shapes={"values": tuple(dynamic[name] for name in interface.inputs)},
            )
        except Exception as error:  # whatever the model's code or torch's exporter says
            raise ExportError(
                f"ONNX is written by torch's exporter, and it cannot trace {type(model).__name__}: "
                f"{_first_line(error)}; choose another container"
            ) from error
        assert program is not None
        graph: ir.Model = program.model
        _hold_values(graph)
    _forget_origins(graph)
    return graph


def _hold_values(model: ir.Model) -> None:
    """Hold what the parameters are now: the exporter's tensors are the parameters themselves."""
    for name, value in model.graph.initializers.items():
        if value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy(), name=name)


@contextmanager
def in_float32(
    model: nn.Module, replacements: Mapping[str, Tensor] | None = None
) -> Iterator[None]:
    """The model on the CPU in float32, which holds all that other dtypes do, for a while.

    Args:
        replacements: tensors that parameters are meanwhile, by name.
    """
    replacements = replacements or {}
    named: list[tuple[str, Tensor]] = [*model.named_parameters(), *model.named_buffers()]
    kept = {name: (tensor, tensor.data) for name, tensor in named}
    try:
        for name, (tensor, data) in kept.items():
            if name in replacements:
                tensor.data = replacements[name]
            elif data.is_floating_point():
                tensor.data = data.to(device="cpu", dtype=torch.float32)
            else:
                tensor.data = data.cpu()
        yield
    finally:
        for tensor, data in kept.values():
            tensor.data = data


def _forget_origins(model: ir.Model) -> None:
    """Leave out where in the sources each node was traced: larger than the graph itself."""
    for node in model.graph:
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()


def _open_product(call: MatrixCall, inputs: Tensor) -> Tensor:
    """A product without its weight; the bias is added as the model does."""
    product: Tensor = torch.onnx.ops.symbolic(
        f"{PRODUCT_DOMAIN}::{PRODUCT}",
        (inputs,),
        {SLOT: call.slot.name},
        dtype=inputs.dtype,
        shape=(*inputs.shape[:-1], call.slot.out_features),
        version=1,
    )
    return product if call.bias is None else product + call.bias


def _replacements(plan: ExportPlan) -> dict[str, Tensor]:
    """Parameters that the graph has otherwise: norms with AWQ scales in them, and matrices that it
    has as codes, which one zero stands for."""
    folds = folded_scales(plan.slot_formats, plan.calibration)
    kept = plan.model_map.slots.keys() - {slot.name for slot in plan.quantized_slots}
    open_matrices = {f"{slot.module}.{slot.parameter}" for slot in plan.quantized_slots}
    # Of experts that are not all quantised the whole parameter stays.
    open_matrices -= {
        f"{slot.module}.{slot.parameter}"
        for slot in map(plan.model_map.slots.__getitem__, kept)
        if slot.kind is SlotKind.EXPERT
    }
    replaced = {}
    for name, parameter in plan.model.named_parameters():
        if name in open_matrices:
            replaced[name] = torch.zeros(()).expand(parameter.shape)
            continue
        tensor, is_folded = fold(name, parameter.detach(), folds)
        if is_folded:
            replaced[name] = tensor.cpu().float()
    return replaced


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on its own registry, axes and deprecations."""
    logger: Any = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), quiet_transformers(), torch.no_grad():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    """The first cause, in one line: torch wraps what happened in what it tried."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0]}" if lines else type(cause).__name__
