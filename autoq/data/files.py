"""Reading documents and token ids from files and named datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoq.data.splitting import Items
from autoq.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
ID_SUFFIXES = (".npy", ".pt")

_TEXT_FIELD = "text"


def read_documents(path: Path) -> Sequence[str]:
    """The documents of a .txt (one), .jsonl (one a line) or .parquet file (one a row).

    Raises:
        DataError: the file is not what its suffix says; JSON errors name the line.
    """
    if path.suffix == ".parquet":
        return _parquet_documents(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} must be UTF-8 text: {error}; convert it") from error
    return list(_jsonl_documents(path, text)) if path.suffix == ".jsonl" else [text]


def read_token_rows(path: Path) -> NDArray[np.integer[Any]]:
    """The integer ids of a .npy or .pt file, [rows, tokens]; one stream [tokens] is one row.

    Raises:
        DataError: no such array in the file, or it would take unpickling to read it.
    """
    ids = _read_npy(path) if path.suffix == ".npy" else _read_pt(path)
    if not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"token ids must be integers, and {path} has {ids.dtype}; convert them")
    if ids.ndim not in (1, 2):
        raise DataError(
            f"token ids must be [sequences, tokens] or one stream [tokens], and {path} has shape "
            f"{list(ids.shape)}; reshape them"
        )
    return ids if ids.ndim == 2 else ids[np.newaxis]


def read_dataset(source: str) -> Items[str]:
    """Documents of a `datasets` dataset: "name", "name:split", or a folder saved to disk.

    Raises:
        DataError: it cannot be had, for example because there is no network, or has no text.
    """
    dataset = _load_dataset(source)
    if isinstance(dataset, dict):
        dataset = dataset.get("train", next(iter(dataset.values())))
    strings = [
        name for name, kind in dataset.features.items() if "string" in getattr(kind, "dtype", "")
    ]
    return _TextColumn(dataset[_text_column(source, strings)])


class _TextColumn:
    """A dataset's column, read row by row; rows without text are empty documents."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int, /) -> str:
        return self._column[index] or ""


def _load_dataset(source: str) -> Any:
    import datasets

    name, _, split = source.partition(":")
    try:
        if Path(source).is_dir():
            return datasets.load_from_disk(source)
        return datasets.load_dataset(name, split=split or "train")
    except Exception as error:  # whatever the network, the hub or a cache may raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"{source!r} is no file here, and no dataset of that name could be loaded ({reason}); "
            "check the name and the network, or give a file "
            f"({', '.join(TEXT_SUFFIXES + ID_SUFFIXES)})"
        ) from error


def _text_column(source: object, strings: Sequence[str]) -> str:
    if not strings:
        raise DataError(f"{source} must have a column of text, and has none; name one 'text'")
    return _TEXT_FIELD if _TEXT_FIELD in strings else strings[0]


def _jsonl_documents(path: Path, text: str) -> Iterator[str]:
    # Not splitlines(): it also splits at separators that JSON strings may hold.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _jsonl_document(path, number, line)


def _jsonl_document(path: Path, number: int, line: str) -> str:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise DataError(f"{path} line {number} is not JSON: {error}; mend or drop it") from error
    fields = record if isinstance(record, dict) else {}
    strings = {name: value for name, value in fields.items() if isinstance(value, str)}
    if not strings:
        raise DataError(
            f"{path} line {number} must be an object with a field of text, such as "
            '{"text": "..."}; mend or drop it'
        )
    return strings.get(_TEXT_FIELD, next(iter(strings.values())))


def _parquet_documents(path: Path) -> Sequence[str]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [
                field.name
                for field in schema
                if arrow.types.is_string(field.type) or arrow.types.is_large_string(field.type)
            ]
            column = _text_column(path, strings)
            values = file.read(columns=[column]).column(column).to_pylist()
    except (arrow.ArrowInvalid, OSError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path} cannot be read as parquet: {reason}; write it again") from error
    return [value for value in values if value is not None]


def _read_npy(path: Path) -> NDArray[Any]:
    try:
        loaded = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise DataError(
            f"{path} must be an array written by numpy.save, without pickled objects: {error}"
        ) from error
    if not isinstance(loaded, np.ndarray):
        raise DataError(f"{path} must hold one array, and holds several; save one with numpy.save")
    return loaded


def _read_pt(path: Path) -> NDArray[Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds; all mean that the file holds more than tensors
        raise DataError(
            f"{path} must hold a tensor and nothing that needs unpickling; write it with "
            "torch.save(ids, path)"
        ) from error
    if isinstance(loaded, dict):
        loaded = loaded.get("input_ids")
    if not isinstance(loaded, torch.Tensor):
        raise DataError(f"{path} must hold a tensor of token ids, alone or as 'input_ids'")
    if loaded.dtype.is_floating_point or loaded.dtype.is_complex:
        raise DataError(f"token ids must be integers, and {path} has {loaded.dtype}; convert them")
    return np.asarray(loaded.numpy())
