"""Putting codes, scales and Q/DQ nodes into the open places of a traced graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import ml_dtypes
import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.tape import Tape

from autoq.export._folding import stored_scale
from autoq.export._onnx_numerics import (
    dequantized,
    float_tensor,
    quantized_input,
    stored_constants,
)
from autoq.export._onnx_trace import PRODUCT_DOMAIN, SLOT
from autoq.export._plan import ExportPlan
from autoq.formats import FORMATS
from autoq.models import SlotName, WeightSlot

Step: TypeAlias = Callable[[], None]

SLOT_KEY, INPUT_KEY = "autoq.slot", "autoq.input"
"""Metadata of the MatMul of a quantised product: whose it is, and the value before quantising."""

_NARROW: Mapping[torch.dtype, ir.DataType] = {
    torch.bfloat16: ir.DataType.BFLOAT16,
    torch.float16: ir.DataType.FLOAT16,
}


def fill_products(model: ir.Model, plan: ExportPlan, done: Step) -> None:
    """Replace every open product by its numerics; `done` is called after each.

    Initialisers are called "<slot>.codes", "<slot>.scale" and so on; the dequantised weight is
    "<slot>.weight".
    """
    slots = {slot.name: slot for slot in plan.quantized_slots}
    filler = _Filler(model.graph, plan)
    for node in [node for node in model.graph if node.domain == PRODUCT_DOMAIN]:
        filler.fill(node, slots[SlotName(node.attributes[SLOT].as_string())])
        done()
    model.graph.opset_imports.pop(PRODUCT_DOMAIN, None)


class _Filler:
    """Inputs that several products read alike are quantised once."""

    def __init__(self, graph: ir.Graph, plan: ExportPlan) -> None:
        self._graph = graph
        self._plan = plan
        self._inputs: dict[tuple[object, ...], ir.Value] = {}
        self._weights: dict[SlotName, ir.Value] = {}

    def fill(self, node: ir.Node, slot: WeightSlot) -> None:
        (x,), (out,) = node.inputs, node.outputs
        assert x is not None
        tape = Tape()
        values = self._constants(slot)
        read = self._input(tape, x, slot, values)
        product = tape.op("MatMul", [read, self._weight(tape, slot, values)])
        product.shape, product.type, product.name = out.shape, out.type, f"{slot.name}.product"
        made = product.producer()
        assert made is not None and x.name is not None
        made.metadata_props.update({SLOT_KEY: slot.name, INPUT_KEY: x.name})
        self._graph.insert_before(node, list(tape.nodes))
        ir.convenience.replace_all_uses_with(out, product, replace_graph_outputs=True)
        self._graph.remove(node, safe=True)

    def _constants(self, slot: WeightSlot) -> dict[str, ir.Value]:
        """The slot's initialisers by the end of their names."""
        known = [
            (key, self._graph.initializers.get(f"{slot.name}.{key}"))
            for key in ("codes", "scale", "tensor_scale", "input_scale", "pre_quant_scale")
        ]
        found = {key: value for key, value in known if value is not None}
        if found:  # a matrix that the model multiplies with twice
            return found
        return {
            key: _register(self._graph, f"{slot.name}.{key}", tensor)
            for key, tensor in expected_constants(self._plan, slot).items()
        }

    def _weight(self, tape: Tape, slot: WeightSlot, values: Mapping[str, ir.Value]) -> ir.Value:
        if slot.name not in self._weights:
            fmt = FORMATS[self._plan.slot_formats[slot.name]]
            weight = dequantized(tape, values, fmt, self._plan.container, f"{slot.name}.weight")
            self._weights[slot.name] = weight
        return self._weights[slot.name]

    def _input(
        self, tape: Tape, x: ir.Value, slot: WeightSlot, values: Mapping[str, ir.Value]
    ) -> ir.Value:
        fmt = FORMATS[self._plan.slot_formats[slot.name]]
        container = self._plan.container
        scales = [values.get(key) for key in ("pre_quant_scale", "input_scale")]
        key = (x, fmt.activation_in(container), *map(_content, scales))
        if key not in self._inputs:
            smoothing, static = scales
            read = x
            if smoothing is not None:
                read = tape.op("Mul", [x, smoothing])
                read.shape, read.type = x.shape, x.type
            self._inputs[key] = quantized_input(tape, read, static, fmt, container)
        return self._inputs[key]


def expected_constants(plan: ExportPlan, slot: WeightSlot) -> dict[str, ir.TensorProtocol]:
    """What the graph must store of a slot, by the end of its name."""
    entry = plan.entry(slot)
    constants = dict(stored_constants(plan.quantize(slot), entry, plan.container))
    smoothing = stored_scale(entry)
    if smoothing is not None:
        constants["pre_quant_scale"] = float_tensor(smoothing)
    return constants


def narrow_matrices(model: ir.Model, dtype: torch.dtype) -> None:
    """Store matrices in the model's own dtype where that is exact, with a Cast after them."""
    if dtype not in _NARROW:
        return
    for value in list(_float_matrices(model.graph)):
        assert value.const_value is not None
        wide = value.const_value.numpy()
        stored = wide.astype(ml_dtypes.bfloat16 if dtype == torch.bfloat16 else np.float16)
        if np.array_equal(stored.astype(np.float32), wide):
            _store_narrow(model.graph, value, ir.tensor(stored))


def _float_matrices(graph: ir.Graph) -> Iterator[ir.Value]:
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.dtype == ir.DataType.FLOAT and len(tensor.shape) >= 2:
            yield value


def _store_narrow(graph: ir.Graph, value: ir.Value, stored: ir.TensorProtocol) -> None:
    name = value.name
    assert name is not None
    tape = Tape()
    del graph.initializers[name]
    narrow = _register(graph, name, stored)
    wide = tape.op("Cast", [narrow], {"to": ir.DataType.FLOAT.value})
    wide.name, wide.shape, wide.type = f"{name}.float32", value.shape, value.type
    ir.convenience.replace_all_uses_with(value, wide)
    graph.insert_before(graph[0], list(tape.nodes))


def _register(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    value = ir.Value(
        name=name,
        shape=ir.Shape(tensor.shape.numpy()),
        type=ir.TensorType(tensor.dtype),
        const_value=tensor,
    )
    graph.register_initializer(value)
    return value


def _content(value: ir.Value | None) -> bytes | None:
    return None if value is None or value.const_value is None else value.const_value.tobytes()
