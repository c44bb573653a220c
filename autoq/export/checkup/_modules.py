"""The linear modules of a checkpoint, as its tensors show them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch

from autoq.export._layouts import LAYOUTS
from autoq.export._layouts.svdquant import STORED_DOWN, STORED_UP
from autoq.export.checkup._files import StoredTensor
from autoq.formats import Container, FormatName

_CODES = ("weight", "weight_packed")
_FACTORS = (STORED_DOWN, STORED_UP)
_SCALES = frozenset(
    {
        "input_global_scale",
        "input_scale",
        "pre_quant_scale",
        "weight_global_scale",
        "weight_scale",
        "weight_scale_2",
        "weight_scale_inv",
        "weight_shape",
        "weight_zero_point",
        *_FACTORS,
    }
)
_CODE_DTYPES = frozenset({torch.float8_e4m3fn, torch.uint8, torch.int8, torch.int32})
_TABLES = frozenset({"wte", "wpe", "shared"})
"""Embeddings whose names do not say it."""

_CONV1D_MODELS = frozenset({"decision_transformer", "gpt2", "imagegpt", "openai-gpt"})
_CONV1D_LEAVES = frozenset({"c_attn", "c_fc", "c_proj", "q_attn"})
"""Where transformers stores `weight` as [in, out], and codes in its place likewise; never scales."""

_MOST_PACKED = (1, 2, 4, 8)


@dataclass(frozen=True, slots=True)
class StoredModule:
    """A module with a matrix, and every tensor that goes with the matrix."""

    name: str
    tensors: Mapping[str, StoredTensor]  # by what follows the module's name; the bias is not here

    @property
    def is_quantized(self) -> bool:
        """Whether it has scales, or codes in the place of its weight."""
        stored = next((self.tensors[name] for name in _CODES if name in self.tensors), None)
        has_codes = stored is not None and stored.dtype in _CODE_DTYPES
        return has_codes or not _SCALES.isdisjoint(self.tensors)

    def shape(self, container: Container, fmt: FormatName) -> tuple[int, int] | None:
        """(out, in) of the matrix, if its codes are of a shape that the format can have."""
        rules = LAYOUTS[container, fmt].tensors
        name = next((name for name in _CODES if name in rules), None)
        if name is None or name not in self.tensors or len(self.tensors[name].shape) != 2:
            return None
        rows, columns = self.tensors[name].shape
        for more_rows, more_columns in product(_MOST_PACKED, repeat=2):
            shape = (rows * more_rows, columns * more_columns)
            if rules[name].shape(*shape) == (rows, columns):
                return shape
        return None


def linear_modules(tensors: Mapping[str, StoredTensor], model_type: str) -> dict[str, StoredModule]:
    """Everything with a two-dimensional weight that is multiplied by, and whatever has scales.

    Args:
        model_type: config.json's; in some families a `weight` is stored as [in, out], and gets its
            shape turned here.
    """
    has_conv1d = model_type in _CONV1D_MODELS
    found: dict[str, dict[str, StoredTensor]] = {}
    for name, tensor in tensors.items():
        module, suffix = _parted(name)
        if suffix in _SCALES or (suffix in _CODES and len(tensor.shape) == 2):
            is_turned = has_conv1d and suffix == "weight" and _leaf(module) in _CONV1D_LEAVES
            turned = replace(tensor, shape=tensor.shape[::-1]) if is_turned else tensor
            found.setdefault(module, {})[suffix] = turned
    return {
        module: StoredModule(module, of_module)
        for module, of_module in found.items()
        if not _is_looked_up(module)
    }


def _parted(name: str) -> tuple[str, str]:
    """The module's part of a tensor's name, and the tensor's, which may have a dot in it."""
    for suffix in _FACTORS:
        if name.endswith(f".{suffix}"):
            return name.removesuffix(f".{suffix}"), suffix
    module, _, suffix = name.rpartition(".")
    return module, suffix


def _is_looked_up(module: str) -> bool:
    leaf = _leaf(module)
    return "emb" in leaf or leaf in _TABLES


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]
