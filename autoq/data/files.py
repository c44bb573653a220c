"""Reading documents and token ids from files and named datasets."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray

from autoq.data.offline import cache_only_when_offline
from autoq.data.splitting import Items
from autoq.errors import DataError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
ID_SUFFIXES = (".npy", ".pt")

_TEXT_FIELD = "text"
_FILES = f"a file ({', '.join(TEXT_SUFFIXES + ID_SUFFIXES)})"


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


def read_saved_dataset(folder: Path) -> Items[str]:
    """Documents of a dataset that `Dataset.save_to_disk` wrote.

    Raises:
        DataError: there is none in the folder, or it has no text.
    """
    import datasets

    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a broken folder may raise
        raise DataError(
            f"no dataset can be read from {folder} ({_reason(error)}); write it again with "
            "save_to_disk, or give a folder of JSONL or parquet files"
        ) from error
    if isinstance(dataset, dict):
        dataset = dataset.get("train", next(iter(dataset.values())))
    return _TextColumn(dataset[_text_column(folder, _string_columns(dataset.features))])


def is_saved_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


class _TextColumn:
    """A dataset's column, read row by row; rows without text are empty documents."""

    def __init__(self, column: Any) -> None:
        self._column = column

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, index: int, /) -> str:
        return self._column[index] or ""


def stream_dataset(source: str) -> Iterator[str]:
    """Documents of a `datasets` dataset, read as they are asked for.

    A dataset of the hub is streamed: rows that are not asked for are not fetched. Without a network
    it comes from the cache of `datasets`, where it may be from before, in the same order.

    Args:
        source: "name", "name:split" or "name:configuration:split" of a dataset on the hub, or the
            same with a folder of data files. The split is "train" if left out.
    Raises:
        DataError: it cannot be had, and why; or it has no text.
    """
    name, configuration, split = _dataset_parts(source)
    try:
        yield from _texts(source, _opened_dataset(source, name, configuration, split))
    except DataError:
        raise
    except Exception as error:  # whatever the network or the hub may raise between two rows
        raise DataError(_unavailable(source, error)) from error


def _opened_dataset(source: str, name: str, configuration: str | None, split: str) -> Any:
    import datasets

    with cache_only_when_offline() as offline:
        is_folder = Path(name).expanduser().is_dir()
        try:
            return datasets.load_dataset(
                str(Path(name).expanduser()) if is_folder else name,
                configuration,
                split=split,
                streaming=is_folder or offline is None,
            )
        except Exception as error:  # whatever the network, the hub or a cache may raise
            if offline is None or is_folder:
                raise
            raise DataError(
                f"{source!r} is no file here, the dataset {name} is not in the cache of "
                f"`datasets`, and {offline}; fetch it where there is a network, or give {_FILES}"
            ) from error


def _dataset_parts(source: str) -> tuple[str, str | None, str]:
    match source.split(":"):
        case [name]:
            return name, None, "train"
        case [name, split]:
            return name, None, split or "train"
        case [name, configuration, split]:
            return name, configuration or None, split or "train"
    raise DataError(
        f"a dataset is NAME, NAME:SPLIT or NAME:CONFIGURATION:SPLIT, got {source!r}; write one"
    )


def _texts(source: str, dataset: Any) -> Iterator[str]:
    column = None
    if dataset.features is not None:
        column = _text_column(source, _string_columns(dataset.features))
    for row in dataset:
        if column is None:  # a stream may not know its columns before its first row
            column = _text_column(source, [n for n, value in row.items() if isinstance(value, str)])
        yield row[column] or ""


def _string_columns(features: Any) -> list[str]:
    return [name for name, kind in features.items() if "string" in getattr(kind, "dtype", "")]


def _unavailable(source: str, error: Exception) -> str:
    return (
        f"{source!r} is no file here, and no dataset of that name could be loaded "
        f"({_reason(error)}); check the name, its configuration and split, or give {_FILES}"
    )


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
    except (ValueError, OSError, EOFError, BadZipFile) as error:
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
