"""What exporting, reading and verifying give back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from autoq.formats import FormatName
from autoq.layers import LayerCalibration
from autoq.layers.kv_cache import CacheSimulation
from autoq.layers.quantize import Container
from autoq.models import ModelMap, SlotName


class Spelling(StrEnum):
    """In which words a container's tensors are written down."""

    OWN = "own"
    TRANSFORMERS_FP8 = "transformers-fp8"
    """compressed-tensors' blocks of FP8 under transformers' own method `fp8`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportedFile:
    """One file of a written checkpoint."""

    path: str  # relative to the checkpoint's folder, with forward slashes
    size_bytes: int
    sha256: str  # hexadecimal


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportResult:
    """A checkpoint that is complete on disk."""

    path: Path
    container: Container
    files: tuple[ExportedFile, ...]
    stored_bytes: int  # of the safetensors files, headers included
    manifest: Mapping[str, Any]  # config.json's quantization_config; empty if nothing is quantised


@dataclass(frozen=True, slots=True, kw_only=True)
class VerificationReport:
    """What was compared, all of it equal."""

    container: Container
    quantized_matrices: int  # dequantised and compared bit for bit
    unquantized_tensors: int  # compared bit for bit with the source
    folded_norms: int  # equal to the source's times the AWQ scale, exactly
    stored_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedModule:
    """One quantised module as a checkpoint stores it.

    `tensors` holds what follows the module's name: "weight", "weight_scale", ...
    """

    name: str
    format: FormatName
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointContents:
    """What a quantised checkpoint says, in the vocabulary of a model map.

    It is what `autoq.layers.simulate.SimulatedModel` needs to run the checkpoint.
    """

    container: Container | None  # None: nothing is quantised
    model_map: ModelMap
    slot_formats: Mapping[SlotName, FormatName]  # of every slot, "none" included
    dequantized: Mapping[SlotName, Tensor]  # read when asked for: float32 [out, in]
    calibration: Mapping[tuple[SlotName, FormatName], LayerCalibration]  # of quantised slots
    storage_dtype: torch.dtype  # what the checkpoint's config.json names
    config: Mapping[str, Any]  # config.json
    kv_cache: CacheSimulation | None = None  # of the rebuilt model; not begun
