"""Proving that an engine checkpoint of TensorRT-LLM holds what was searched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from autoq.errors import ExportError, VerificationError
from autoq.export._folding import folded_scales, stored_scale
from autoq.export._plan import ExportPlan
from autoq.export._tensorrt_llm_families import (
    BLOCK_NORMS,
    EMBEDDING,
    FINAL_NORM,
    HEAD,
    KV_SCALE,
    POSITIONS,
    ROUTER,
)
from autoq.export._tensorrt_llm_layouts import ENGINE_LAYOUTS, NORM_SCALE
from autoq.export._tensorrt_llm_names import family_of, layer_path
from autoq.export._tensorrt_llm_plain import head_bias
from autoq.export._tensorrt_llm_ranks import cache_scale_of, original_weight
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
    cache_scales: int  # of layers whose keys and values are quantised
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
        cache_scales=comparison.cache_scales,
        stored_bytes=sum(sizes),
    )


class _Comparison:
    def __init__(self, plan: ExportPlan) -> None:
        self._plan = plan
        self._folds = folded_scales(plan.slot_formats, plan.calibration)
        self.quantized = self.plain = self.folded = self.cache_scales = 0

    def run(self, stored: EngineCheckpoint) -> None:
        model, family = self._plan.model, family_of(self._plan.model)
        for which, name in (("input", EMBEDDING), ("output", HEAD)):
            original = getattr(model, f"get_{which}_embeddings")().weight
            self._rows(stored, f"{name}.weight", original)
        bias = head_bias(model)
        if bias is not None:
            self._rows(stored, f"{HEAD}.bias", bias)
        if family.positions is not None:
            positions = model.get_parameter(f"{family.positions}.weight")
            self._rows(stored, f"{POSITIONS}.weight", positions)
        self._norm(family.final_norm, FINAL_NORM, stored.last)
        for layer in range(stored.layers):
            self._layer(stored, layer)
        if stored.left:
            raise VerificationError(f"the checkpoint holds {min(stored.left)}, unasked for")

    def _rows(self, stored: EngineCheckpoint, name: str, original: Tensor) -> None:
        rows = stored.rows(name)
        self._plain(name, rows[: len(original)], original)
        if bool(rows[len(original) :].any()):
            raise VerificationError(f"rows of {name} beyond the model's must be zero")

    def _layer(self, stored: EngineCheckpoint, layer: int) -> None:
        formats, path = set(), layer_path(self._plan.model, layer)
        for part, matrix in stored.matrices(layer):
            formats.add(matrix.format)
            self._matrix(SlotName(f"{path}.{part}"), matrix)
        family = family_of(self._plan.model)
        if family.has_experts:
            router = self._plan.model.get_parameter(f"{path}.{family.router}.weight")
            _equal(ROUTER, stored.layer_tensor(layer, f"{ROUTER}.weight"), router.float())
            self.plain += 1
        scale = cache_scale_of(self._plan, layer)
        if scale is not None:
            _equal(KV_SCALE, stored.layer_tensor(layer, KV_SCALE), scale)
            self.cache_scales += 1
        for engine, norm in family.norms.items():
            self._norm(f"{path}.{norm}", engine, partial(stored.layer_tensor, layer))
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

    def _norm(self, path: str, engine: str, read: Callable[[str], Tensor]) -> None:
        for leaf, parameter in self._plan.model.get_submodule(path).named_parameters(recurse=False):
            stored = read(f"{engine}.{leaf}")
            is_less_one = family_of(self._plan.model).adds_one and leaf == "weight"
            original = 1 + parameter.float() if is_less_one else parameter.detach()
            if path not in self._folds:
                self._plain(f"{path}.{leaf}", stored, original)
                continue
            scale = self._folds[path][1].cpu()
            # Powers of two, so that dividing gives the model's again.
            expected = original.to(self._plan.scale_dtype).float()
            _equal(f"{path}.{leaf}", stored.float() / scale, expected)
            self.folded += leaf == "weight"

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
