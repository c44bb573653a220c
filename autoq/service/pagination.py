"""Cursors: where the next page begins, as text that clients hand back unread.

A cursor is a position in the order of the list (the last row's sort keys), not a count of rows, so
rows that come or go between two pages neither repeat others nor hide them. It is no secret and is
not trusted: it is checked as any other input is.
"""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any

from fastapi import Query

from autoq.errors import InputError

_LONGEST = 2_000
_LARGEST_INTEGER = 2**63 - 1  # what databases have room for

Limit = Annotated[int, Query(ge=1, le=500, description="Entries of a page.")]
Cursor = Annotated[
    str | None,
    Query(max_length=_LONGEST, description="The next_cursor of the page before; none: the first."),
]

STORABLE = r"^[^\x00]*$"
"""Text that every database can be asked for."""


def encode_cursor(listed: str, *position: str | int) -> str:
    """The cursor behind a row.

    Args:
        listed: what the list is of; a cursor of another list is refused.
        position: the row's sort keys.
    """
    plain = json.dumps([listed, *position], separators=(",", ":")).encode()
    return base64.urlsafe_b64encode(plain).decode().rstrip("=")


def decode_cursor(listed: str, cursor: str, *kinds: type[str | int]) -> tuple[Any, ...]:
    """The sort keys of the row that the cursor stands behind.

    Args:
        kinds: their types, in order.
    Raises:
        InputError: this list never gave that cursor.
    """
    parts = _parts(cursor)
    if len(parts) != len(kinds) + 1 or parts[0] != listed:
        raise _refusal()
    for part, kind in zip(parts[1:], kinds, strict=True):
        if type(part) is not kind or not _fits_databases(part):
            raise _refusal()
    return tuple(parts[1:])


def _parts(cursor: str) -> list[Any]:
    if len(cursor) > _LONGEST:
        raise _refusal()
    try:
        padded = cursor.encode("ascii") + b"=" * (-len(cursor) % 4)
        parts = json.loads(base64.b64decode(padded, altchars=b"-_", validate=True))
    except (UnicodeError, binascii.Error, ValueError, RecursionError):
        raise _refusal() from None
    return parts if isinstance(parts, list) else []


def _fits_databases(part: str | int) -> bool:
    if isinstance(part, int):
        return abs(part) <= _LARGEST_INTEGER
    return part.isprintable()


def _refusal() -> InputError:
    return InputError(
        "the cursor must be the next_cursor of a page of this list, as it was given; leave it out "
        "for the first page"
    )
