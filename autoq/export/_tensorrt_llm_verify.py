"""Proving that an engine checkpoint of TensorRT-LLM holds what was searched."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from autoq.errors import ExportError, VerificationError
from autoq.export._folding import folded_scales, stored_scale
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_layouts import ENGINE_LAYOUTS, NORM_SCALE
from autoq.export._tensorrt_llm_names import (
    BLOCK_NORMS,
    EMBEDDING,
    FAMILIES,
    FINAL_NORM,
    HEAD,
    ROUTER,
)
from autoq.export._tensorrt_llm_ranks import original_weight
from autoq.export._tensorrt_llm_reader import EngineCheckpoint, StoredMatrix, opened
from autoq.formats import FORMATS, NONE
from autoq.layers import Container, QuantizedWeight
from autoq.layers.quantize import dequantize_weight, input_scale
from autoq.models import SlotName


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRtLlmReport:
    """What was compared, all of it equal."""

    ranks: int
    quantized_matrices: int  # dequantised, and compared bit for bit with the simulation's
    unquantized_tensors: int  # biases included, compared bit for bit with the model's
    folded_norms: int  # equal to the model's times the input scale, exactly
    stored_bytes: int


def verify_tensorrt_llm(folder: Path, plan: ExportPlan) -> TensorRtLlmReport:
    """Put the ranks together again and compare everything with the plan.

    Raises:
        VerificationError: something lacks, is unknown, or is not what was to be written.
    """
    comparison = _Comparison(plan)
    try:
        with opened(folder) as stored:
            comparison.run(stored)
            ranks = stored.config["mapping"]["world_size"]
    except ExportError as error:
        raise VerificationError(str(error)) from error
    sizes = [path.stat().st_size for path in folder.glob("rank*.safetensors")]
    return TensorRtLlmReport(
        ranks=ranks,
        quantized_matrices=comparison.quantized,
        unquantized_tensors=comparison.plain,
        folded_norms=comparison.folded,
        stored_bytes=sum(sizes),
    )


class _Comparison:
    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan
        self._folds = folded_scales(plan.slot_formats, plan.calibration)
        self.quantized = self.plain = self.folded = 0

    def run(self, stored: EngineCheckpoint) -> None:
        model = self._plan.model
        for which, name in (("input", EMBEDDING), ("output", HEAD)):
            original = getattr(model, f"get_{which}_embeddings")().weight
            rows = stored.rows(f"{name}.weight")
            self._plain(f"{name}.weight", rows[: len(original)], original)
            if bool(rows[len(original) :].any()):
                raise VerificationError(f"rows beyond the vocabulary of {name} must be zero")
        self._norm("model.norm", stored.last(f"{FINAL_NORM}.weight"))
        for layer in range(stored.layers):
            self._layer(stored, layer)
        if stored.left:
            raise VerificationError(f"the checkpoint holds {min(stored.left)}, unasked for")

    def _layer(self, stored: EngineCheckpoint, layer: int) -> None:
        formats = set()
        for path, matrix in stored.matrices(layer):
            formats.add(matrix.format)
            self._matrix(SlotName(f"model.layers.{layer}.{path}"), matrix)
        family = FAMILIES[type(self._plan.model).__name__]
        if family.has_experts:
            router = self._plan.model.get_parameter(f"model.layers.{layer}.mlp.gate.weight")
            _equal(ROUTER, stored.layer_tensor(layer, f"{ROUTER}.weight"), router.float())
            self.plain += 1
        for engine, path in family.norms.items():
            self._norm(
                f"model.layers.{layer}.{path}", stored.layer_tensor(layer, f"{engine}.weight")
            )
        if any(fmt != NONE and ENGINE_LAYOUTS[fmt].input_divisor for fmt in formats):
            for norm in BLOCK_NORMS:
                ones = stored.layer_tensor(layer, f"{norm}.{NORM_SCALE}")
                _equal(f"{norm}.{NORM_SCALE}", ones, torch.ones(1))

    def _matrix(self, name: SlotName, matrix: StoredMatrix) -> None:
        planned = self._plan.slot_formats.get(name, NONE)
        if matrix.format != planned:
            raise VerificationError(f"{name} must be {planned}, and reads back as {matrix.format}")
        is_expert = ".experts." in name
        bias = None if is_expert else self._plan.model.get_submodule(name).bias
        if (bias is None) != (matrix.bias is None):
            raise VerificationError(f"{name} has a bias in one of model and checkpoint only")
        if isinstance(bias, Tensor) and matrix.bias is not None:
            self._plain(f"{name}.bias", matrix.bias, bias)
        if isinstance(matrix.weight, QuantizedWeight):
            self._quantized(name, matrix, matrix.weight)
        else:
            weight = original_weight(self._plan.model, name)
            self._plain(f"{name}.weight", matrix.weight, weight)

    def _quantized(self, name: SlotName, matrix: StoredMatrix, weight: QuantizedWeight) -> None:
        slot = self._plan.model_map.slots[name]
        entry = self._plan.entry(slot)
        _equal(name, dequantize_weight(weight), dequantize_weight(self._plan.quantize(slot)))
        scale = input_scale(FORMATS[matrix.format], entry, container=Container.MODELOPT)
        if scale is not None and matrix.input_scale is not None:
            _equal(f"input scale of {name}", matrix.input_scale.reshape(()), scale)
        elif (scale is None) != (matrix.input_scale is None):
            raise VerificationError(f"{name} has a scale of inputs where none is, or lacks it")
        multiplier = stored_scale(entry)
        expected = torch.ones(slot.in_features) if multiplier is None else multiplier
        if matrix.input_multiplier is not None:
            _equal(f"input multiplier of {name}", matrix.input_multiplier, expected)
        elif multiplier is not None:
            raise VerificationError(f"{name} must multiply its inputs, and reads back without")
        self.quantized += 1

    def _norm(self, path: str, stored: Tensor) -> None:
        original = self._plan.model.get_parameter(f"{path}.weight")
        if path not in self._folds:
            self._plain(f"{path}.weight", stored, original)
            return
        scale = self._folds[path][1].cpu()
        # Powers of two, so that dividing gives the model's again.
        _equal(path, stored.float() / scale, original.to(self._plan.scale_dtype).float())
        self.folded += 1

    def _plain(self, name: str, stored: Tensor, original: Tensor) -> None:
        _equal(name, stored, original.detach().to(self._plan.scale_dtype))
        self.plain += 1


def _equal(name: str, stored: Tensor, expected: Tensor) -> None:
    expected = expected.detach().cpu()
    is_same = stored.dtype == expected.dtype and stored.shape == expected.shape
    # Bytes, not values: zeros have a sign.
    if not is_same or not torch.equal(_bytes(stored), _bytes(expected)):
        raise VerificationError(f"{name} does not read back as it was to be written; export again")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)
