"""What processes say to each other arrives as it was sent, and nothing else is taken for it."""

from __future__ import annotations

import io
import json
import struct
from typing import Any

import numpy as np
import pytest

from autoq.api.distribution.messages import LARGEST_JSON_BYTES, Message, receive, send
from autoq.errors import DataError


def sent(message: Message) -> bytes:
    stream = io.BytesIO()
    send(stream, message)
    return stream.getvalue()


def framed(content: Any) -> io.BytesIO:
    return framed_text(json.dumps(content).encode())


def framed_text(text: bytes) -> io.BytesIO:
    return io.BytesIO(struct.pack("<Q", len(text)) + text)


def test_arrays_of_every_shape_arrive() -> None:
    arrays = {
        "matrix": np.arange(6, dtype=np.float32).reshape(2, 3).T,  # not contiguous
        "number": np.asarray(2.5),
        "empty": np.zeros((0, 4), dtype=np.uint8),
        "not a number": np.asarray([np.nan, -0.0]),
    }
    stream = io.BytesIO(sent(Message({"asked": "score", "index": 3}, arrays)) + sent(Message({})))
    found = receive(stream)
    assert found.header == {"asked": "score", "index": 3}
    assert list(found.arrays) == list(arrays)
    for name, array in arrays.items():
        assert found.arrays[name].dtype == array.dtype
        assert found.arrays[name].shape == array.shape
        assert found.arrays[name].tobytes() == array.tobytes()
    assert receive(stream) == Message({})
    with pytest.raises(EOFError):
        receive(stream)


@pytest.mark.parametrize("missing", [1, 9, 60])
def test_half_a_message_is_the_end_of_the_other_side(missing: int) -> None:
    whole = sent(Message({"a": 1}, {"b": np.zeros(8)}))
    with pytest.raises(EOFError):
        receive(io.BytesIO(whole[:-missing]))


@pytest.mark.parametrize(
    ("stream", "reason"),
    [
        (io.BytesIO(struct.pack("<Q", LARGEST_JSON_BYTES + 1)), "at most"),
        (io.BytesIO(struct.pack("<Q", 4) + b"{[}]"), "must be JSON"),
        (framed([1]), "must be JSON"),
        (framed({"header": {}, "arrays": [["a", "|O", [1]]]}), "arrays hold numbers"),
        (framed({"header": {}, "arrays": [["a", "<f8", [-1]]]}), "whole numbers"),
        (framed({"header": {}, "arrays": [["a", "<f8", ["1"]]]}), "whole numbers"),
        (framed_text(b"[" * 100_000), "must be JSON"),
    ],
    ids=["too_long", "no_json", "no_header", "objects", "negative", "text", "deep"],
)
def test_what_is_no_message_is_refused(stream: io.BytesIO, reason: str) -> None:
    with pytest.raises(DataError, match=reason):
        receive(stream)
