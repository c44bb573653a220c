"""The tensors of a checkpoint by its headers alone: what strangers wrote is believed of nothing."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeGuard

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from autoq.errors import ExportError, ModelError
from autoq.models.folder import INDEX_NAME, shard_paths

_LENGTH_BYTES = 8
_MOST_HEADER_BYTES = 100 * 2**20  # as the safetensors library allows
_LONGEST_NAME = 512
_MOST_DIMENSIONS = 8

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "BOOL": torch.bool,
        "U8": torch.uint8,
        "I8": torch.int8,
        "I16": torch.int16,
        "I32": torch.int32,
        "I64": torch.int64,
        "U16": torch.uint16,
        "U32": torch.uint32,
        "U64": torch.uint64,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F8_E8M0": torch.float8_e8m0fnu,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
    }
)


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """What a header says of a tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path


class StoredTensors(Mapping[str, StoredTensor]):
    """Every tensor of a folder by name; values are read when asked for."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ExportError: a file, the index or a header is missing or malformed, or two files hold
                one tensor; the message says which.
        """
        self._tensors: dict[str, StoredTensor] = {}
        self._opened: tuple[Path, Any] | None = None  # to open it parses all of its header
        try:
            files = shard_paths(folder)
        except ModelError as error:
            raise ExportError(str(error)) from error
        for file in files:
            for tensor in _header_tensors(file):
                if tensor.name in self._tensors:
                    other = self._tensors[tensor.name].file.name
                    raise ExportError(f"{tensor.name} is in two files, {other} and {file.name}")
                self._tensors[tensor.name] = tensor
        _check_index(folder / INDEX_NAME, self._tensors)

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def read(self, name: str) -> Tensor:
        """One tensor's values.

        Raises:
            ExportError: they cannot be read.
        """
        file = self._tensors[name].file
        try:
            if self._opened is None or self._opened[0] != file:
                self._opened = (file, safe_open(str(file), framework="pt"))
            values: Tensor = self._opened[1].get_tensor(name)
            return values
        except (SafetensorError, OSError) as error:
            raise ExportError(f"{name} in {file.name} cannot be read: {error}") from error


def _header_tensors(file: Path) -> Iterator[StoredTensor]:
    header, data_bytes = _header(file)
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        tensor, span = _entry(file, name, entry)
        spans.append((*span, name))
        yield tensor
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ExportError(f"{file.name}: the bytes of {name} overlap or leave a gap")
        end = stop
    if end != data_bytes:
        raise ExportError(f"{file.name} holds {data_bytes} bytes of tensors, its header {end}")


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and how many bytes follow it."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(_LENGTH_BYTES), "little")
        if not 0 < length <= min(size - _LENGTH_BYTES, _MOST_HEADER_BYTES):
            raise ExportError(f"{file.name} is truncated or not safetensors: a header of {length}")
        try:
            header = json.loads(stream.read(length), object_pairs_hook=_without_duplicates)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"the header of {file.name} is no JSON object: {error}") from error
    if not isinstance(header, dict):
        raise ExportError(f"the header of {file.name} is no JSON object")
    return header, size - _LENGTH_BYTES - length


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found


def _entry(file: Path, name: str, entry: Any) -> tuple[StoredTensor, tuple[int, int]]:
    fault = _fault(name, entry)
    if fault is not None:
        raise ExportError(f"the header of {file.name} is malformed: {fault}")
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    start, stop = entry["data_offsets"]
    if stop - start != math.prod(shape) * dtype.itemsize:
        raise ExportError(
            f"the header of {file.name} is malformed: {name} {list(shape)} of {entry['dtype']} does "
            f"not take {stop - start} bytes"
        )
    return StoredTensor(name, dtype, shape, file), (start, stop)


def _fault(name: str, entry: Any) -> str | None:
    if len(name) > _LONGEST_NAME or not name.isprintable() or not name:
        return f"a tensor's name must be printable text, got {name[:80]!r}"
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        return f"{name} must have one of the dtypes {', '.join(_DTYPES)}, got {dtype!r:.80}"
    shape, offsets = entry.get("shape"), entry.get("data_offsets")
    if not _are_counts(shape) or len(shape) > _MOST_DIMENSIONS:
        return f"{name} must have a shape of at most {_MOST_DIMENSIONS} numbers, got {shape!r:.80}"
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        return f"{name} must lie between two offsets, got {offsets!r:.80}"
    return None


def _are_counts(values: Any) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_index(index: Path, tensors: Mapping[str, StoredTensor]) -> None:
    if not index.is_file():
        return
    listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    for name in sorted(listed.keys() | tensors.keys()):
        stored = tensors[name].file.name if name in tensors else None
        if listed.get(name) != stored:
            raise ExportError(
                f"{index.name} says that {name} is in {listed.get(name)}, and it is in {stored}"
            )
