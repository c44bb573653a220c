"""What a model's own folder tells about how it is stored."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from autoq.models.folder import read_config, shard_paths

_DTYPES: Mapping[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}


def storage_dtypes(source: Path) -> dict[str, torch.dtype]:
    """Name -> dtype of the floating point tensors in a model folder, from the headers alone."""
    found: dict[str, torch.dtype] = {}
    for shard in shard_paths(source):
        with safe_open(shard, framework="pt") as file:
            names = file.keys()
            for name in names:
                dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                if dtype is not None:
                    found[name] = dtype
    return found


def model_config(
    model: nn.Module, source: Path | None, storage_dtype: torch.dtype
) -> dict[str, Any]:
    """config.json for the exported model, without a manifest.

    The source's is taken as it is, so that fields transformers does not know survive.
    """
    if source is not None:
        config = dict(read_config(source))
    else:
        settings: Any = model.config
        config = json.loads(settings.to_json_string())
        config["architectures"] = [type(model).__name__]
        config["dtype"] = str(storage_dtype).removeprefix("torch.")
    config.pop("quantization_config", None)
    return config
