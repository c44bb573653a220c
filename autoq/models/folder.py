"""Checks of a model folder that need no model: files, headers, formats."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoq.errors import ModelError

INDEX_NAME = "model.safetensors.index.json"
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf")
_OTHER_EXPORTS = {
    "model.onnx": "an ONNX graph, which onnxruntime opens",
    "rank0.safetensors": "a checkpoint for TensorRT-LLM's engine builder, trtllm-build",
}
_FLOAT_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LENGTH_BYTES = 8  # a safetensors file starts with its header's length, little-endian


def check_model_folder(folder: Path) -> Mapping[str, Any]:
    """Check that the folder holds an unquantised model in whole safetensors files.

    Returns:
        The content of config.json.
    Raises:
        ModelError: it does not; the message says what is wrong and what to do.
    """
    config = read_config(folder)
    _refuse_quantised(folder, config)
    for shard in shard_paths(folder):
        _check_shard(shard)
    return config


def read_config(folder: Path) -> Mapping[str, Any]:
    """The content of the folder's config.json.

    Raises:
        ModelError: no folder, no config.json, or no JSON object in it.
    """
    if not folder.exists():
        raise ModelError(f"a model is a folder, and {folder} does not exist; check the path")
    if not folder.is_dir():
        raise ModelError(f"a model is a folder, and {folder} is a file; give the folder it lies in")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelError(
            f"a model folder has a config.json, and {folder} has none; "
            "give the folder that save_pretrained wrote"
        )
    return _read_json_object(path)


def shard_paths(folder: Path) -> list[Path]:
    """The safetensors files that hold the folder's weights, sorted by name.

    Raises:
        ModelError: there are none, or the index names one that is missing.
    """
    index = folder / INDEX_NAME
    if index.is_file():
        return _indexed_shards(folder, index)
    single = folder / "model.safetensors"
    if single.is_file():
        return [single]
    raise ModelError(_no_weights(folder))


def storage_dtype(folder: Path) -> str:
    """Name of the torch dtype that most of the folder's weight bytes are stored in.

    Raises:
        ModelError: the folder has no readable weights, or none of them are floating point.
    """
    stored_bytes: dict[str, int] = {}
    for shard in shard_paths(folder):
        header, _ = _shard_header(shard, shard.stat().st_size)
        for name, entry in header.items():
            if name != "__metadata__" and entry["dtype"] in _FLOAT_DTYPES:
                start, end = entry["data_offsets"]
                dtype = _FLOAT_DTYPES[entry["dtype"]]
                stored_bytes[dtype] = stored_bytes.get(dtype, 0) + end - start
    if not stored_bytes:
        raise ModelError(
            f"a model has float32, bfloat16 or float16 weights, and {folder} has none; "
            "give an unquantised model"
        )
    return max(stored_bytes, key=lambda dtype: stored_bytes[dtype])


def _indexed_shards(folder: Path, index: Path) -> list[Path]:
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} must map weights to files in `weight_map`; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name:
            raise ModelError(f"{index} must name files of its own folder, got {name!r}")
        if not os.path.isfile(folder / name):  # false for names that no file can have
            raise ModelError(f"{index} names {name}, and that file is missing; fetch it again")
    return [folder / name for name in names]


def _no_weights(folder: Path) -> str:
    for name, what in _OTHER_EXPORTS.items():
        if (folder / name).is_file():
            return f"{folder} is {what}; give the study, or a checkpoint in another container"
    others = sorted(file.name for pattern in _OTHER_WEIGHTS for file in folder.glob(pattern))
    if others:
        return (
            f"weights must be safetensors, and {folder} has {others[0]}, which is not safetensors; "
            "convert it with save_pretrained on a machine where you trust the file"
        )
    strays = sorted(file.name for file in folder.glob("*.safetensors"))
    if strays:
        return (
            f"weights lie in model.safetensors or are listed in {INDEX_NAME}, and {folder} has "
            f"only {strays[0]}; fetch the index, or rename the file"
        )
    return f"{folder} has a config.json without weights (no model.safetensors); fetch the weights"


def _refuse_quantised(folder: Path, config: Mapping[str, Any]) -> None:
    method = config.get("quantization_config")
    if method is None and not (folder / "hf_quant_config.json").is_file():
        return
    name = method.get("quant_method") if isinstance(method, dict) else None
    raise ModelError(
        f"the model to search must not be quantised, and {folder} is already"
        f"{f' ({name})' if name else ''}; give the folder it was made from"
    )


def _check_shard(path: Path) -> None:
    size = path.stat().st_size
    header, data_start = _shard_header(path, size)
    ends = [_end(path, name, header[name]) for name in header if name != "__metadata__"]
    expected = data_start + max(ends, default=0)
    if size != expected:
        state = "truncated" if size < expected else "damaged"
        raise ModelError(
            f"{path} is {state}: its header announces {expected} bytes, the file has {size}; "
            "fetch it again"
        )


def _end(path: Path, name: str, entry: Any) -> int:
    """Where a tensor's bytes end, from the start of the data."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) else None
    if isinstance(offsets, list) and len(offsets) == 2 and all(type(at) is int for at in offsets):
        return int(offsets[1])
    raise ModelError(
        f"{path} is damaged: its header gives no two offsets of {name}; fetch it again"
    )


def _shard_header(path: Path, size: int) -> tuple[dict[str, Any], int]:
    """The header, and where in the file the data start."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            raise ModelError(
                f"{path} is truncated or not safetensors: a header of {length} bytes does not fit "
                f"its {size} bytes; fetch it again"
            )
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError) as error:
            raise ModelError(
                f"{path} is not safetensors: its header is no JSON; fetch it again"
            ) from error
    if not isinstance(header, dict):
        raise ModelError(f"{path} is not safetensors: its header is no JSON object; fetch it again")
    return header, _LENGTH_BYTES + length


def _read_json_object(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise ModelError(f"{path} must be JSON, and is not: {error}; fetch it again") from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path} must hold a JSON object, and holds a {type(content).__name__}; fetch it again"
        )
    return content
