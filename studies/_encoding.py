"""How values become columns: arrays as npy bytes, plain data as strict JSON, hashes, times."""

from __future__ import annotations

import hashlib
import io
import json
import math
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from autoq.errors import StoreError

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_VALUE_BYTES = 900_000_000
"""One value of either database holds at most about 1e9 bytes; blobs are kept in pieces."""

PLAIN_DTYPE_KINDS = "biufcSU"
"""Of NumPy's; arrays of others are not stored."""


def utc_now() -> datetime:
    """The time, in UTC and aware of it."""
    return datetime.now(UTC)


def iso_time(moment: datetime) -> str:
    """ISO 8601 in UTC with microseconds, so that text order is time order."""
    return moment.astimezone(UTC).isoformat(timespec="microseconds")


def sha256_hex(data: bytes) -> str:
    """SHA-256 as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def finite_or_none(value: float | None) -> float | None:
    """`value` as a Python float; None where SQL and JSON have no number: NaN, Inf and None."""
    if value is None or not math.isfinite(value):
        return None
    return float(value)


def json_clean(value: object) -> Any:
    """`value` as what every JSON reader accepts: NaN and Inf become None, tuples lists.

    JSON has no NaN; a reader that meets one refuses the whole document. Where the exact value
    matters it is stored as an array.

    Raises:
        TypeError: a value that is not plain data; arrays belong into `put_array`.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str | PurePath):
        return str(value)
    if _is_numpy_scalar(value):
        return json_clean(value.item())  # type: ignore[attr-defined]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return finite_or_none(value)
    if isinstance(value, Mapping):
        return {_json_key(key): json_clean(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_clean(item) for item in value]
    raise TypeError(f"only plain data goes into a JSON column, got {type(value).__name__}")


def _is_numpy_scalar(value: object) -> bool:
    # Looking at a list of studies takes less time than loading numpy.
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.bool_ | numpy.integer | numpy.floating)


def canonical_json(value: object) -> str:
    """The one spelling of `value`: sorted keys, no spaces, strict JSON."""
    return json.dumps(json_clean(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def study_key(configuration: Mapping[str, object], fingerprint: str) -> str:
    """What makes two searches the same study: SHA-256 over configuration and model fingerprint."""
    document = {"configuration": configuration, "fingerprint": fingerprint}
    return sha256_hex(canonical_json(document).encode())


def encode_array(array: NDArray[Any], most_bytes: int | None = None) -> bytes:
    """`array` as npy bytes in C order: equal values and dtype give equal bytes.

    Args:
        most_bytes: that may become of it; None is any number.
    Raises:
        StoreError: a dtype that npy cannot hold without pickle, or too many bytes.
    """
    if array.dtype.kind not in PLAIN_DTYPE_KINDS:
        raise StoreError(
            f"arrays of dtype {array.dtype} cannot be stored; "
            "convert to a number type of NumPy's own (view bit patterns as unsigned integers)"
        )
    if most_bytes is not None and array.nbytes > most_bytes:
        raise StoreError(
            f"a value of the database holds at most {most_bytes} bytes, and a score batch has "
            f"{array.nbytes}; score fewer sequences at a time (--batch-size) or fewer formats"
        )
    import numpy as np

    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.asarray(array, order="C"), allow_pickle=False)
    return buffer.getvalue()


def decode_array(data: bytes, sha256: str, described: str) -> NDArray[Any]:
    """The array that `encode_array` was given.

    Raises:
        StoreError: the bytes are not those that were written.
    """
    if sha256_hex(data) != sha256:
        raise StoreError(
            f"{described} is damaged: its bytes do not match the SHA-256 stored with them; "
            "restore the store from a copy, or reset the stage and run it again"
        )
    import numpy as np

    decoded: NDArray[Any] = np.lib.format.read_array(io.BytesIO(data), allow_pickle=False)
    return decoded


def _json_key(key: object) -> str:
    if isinstance(key, str):
        return str(key)
    raise TypeError(f"keys of a JSON column are strings, got {type(key).__name__}")
