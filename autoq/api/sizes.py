"""Sizes as users write them."""

from __future__ import annotations

import re

from autoq.errors import InputError

_UNITS = {"": 1, "B": 1}
_UNITS.update({f"{prefix}B": 1000 ** (power + 1) for power, prefix in enumerate("KMGT")})
_UNITS.update({f"{prefix}IB": 1024 ** (power + 1) for power, prefix in enumerate("KMGT")})
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?)\s*([A-Za-z]*)\s*")


def parse_bytes(size: str | int) -> int:
    """Bytes from a text such as 4GB (10^9), 4GiB (2^30) or 900MB; numbers are bytes.

    Raises:
        InputError: it is no such text, or not above 0.
    """
    found = _SIZE.fullmatch(str(size))
    if found is None or found[2].upper() not in _UNITS:
        raise InputError(
            f"a size must be a number and MB, MiB, GB or GiB, got {size!r}; write for example 4GB"
        )
    count = int(float(found[1]) * _UNITS[found[2].upper()])
    if count < 1:
        raise InputError(f"a bound on memory must be above 0, got {size!r}; write for example 4GB")
    return count
