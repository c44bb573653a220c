"""What processes say to each other: JSON, and arrays as their bytes. Nothing in it is ever run.

A message is eight bytes with the length of its JSON, the JSON, and the arrays that the JSON names,
one after another, as they lie in memory.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from autoq.errors import DataError

LARGEST_JSON_BYTES = 1 << 30
"""A longer one comes from somebody who speaks another language."""

_STRANGERS_JSON_BYTES = 1 << 10

_LENGTH = struct.Struct("<Q")
_PLAIN_KINDS = "biufc"  # of numpy's dtypes: numbers


@dataclass(frozen=True, slots=True)
class Message:
    """Plain data, and arrays by name."""

    header: Mapping[str, Any]
    arrays: Mapping[str, NDArray[Any]] = field(default_factory=dict)


def send(stream: BinaryIO, message: Message) -> None:
    """Write a message and see it off.

    Raises:
        OSError: nobody reads any more.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in message.arrays.items()}
    about = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    text = json.dumps({"header": message.header, "arrays": about}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    stream.writelines(array.reshape(-1).view(np.uint8).data for array in arrays.values())
    stream.flush()


def receive(stream: BinaryIO, *, from_stranger: bool = False) -> Message:
    """The next message; waits for it.

    Args:
        from_stranger: nothing is known of who sends it, so it must be short and have no arrays.
    Raises:
        EOFError: the other side is gone.
        DataError: what comes is no message.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    largest = _STRANGERS_JSON_BYTES if from_stranger else LARGEST_JSON_BYTES
    if length > largest:
        raise DataError(
            f"a message must have at most {largest} bytes of JSON, got {length}; see that "
            "only processes of autoq write there"
        )
    try:
        content = json.loads(_exactly(stream, length))
        arrays = content["arrays"]
        if from_stranger and arrays:
            raise ValueError("arrays of a stranger")
        about = [(str(name), _number_type(kind), _shape(shape)) for name, kind, shape in arrays]
        header = dict(content["header"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(
            f"a message must be JSON with a header and arrays, got something else ({error}); see that "
            "only processes of autoq write there"
        ) from None
    return Message(header, {name: _array(stream, kind, shape) for name, kind, shape in about})


def _number_type(text: str) -> np.dtype[Any]:
    kind = np.dtype(text)
    if kind.kind not in _PLAIN_KINDS:
        raise ValueError(f"arrays hold numbers, and one has dtype {text}")
    return kind


def _shape(sizes: Any) -> list[int]:
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError(f"an array has a shape of whole numbers, and one has {sizes}")
    return list(sizes)


def _array(stream: BinaryIO, kind: np.dtype[Any], shape: list[int]) -> NDArray[Any]:
    array = np.empty(shape, kind)
    _fill(stream, array.reshape(-1).view(np.uint8).data)
    return array


def _exactly(stream: BinaryIO, length: int) -> bytes:
    found = bytearray(length)
    _fill(stream, memoryview(found))
    return bytes(found)


def _fill(stream: BinaryIO, place: memoryview) -> None:
    while place:
        count = stream.readinto(place)  # type: ignore[attr-defined]
        if not count:
            raise EOFError("the other side is gone")
        place = place[count:]
