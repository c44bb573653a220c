"""Rows that carry a hash of what they say: one that changed on the disk is refused where it is read.

A row's seal is the SHA-256 of its table's name and its columns, but not of its number, which the
database gives it later, nor of bytes, which have a hash of their own in another column. Whatever
the ORM writes is sealed and whatever it reads as a whole row is verified; a query of single columns
(`autoq list`) verifies nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, DateTime, Float, Integer, LargeBinary, event
from sqlalchemy.orm import Mapped, mapped_column

from autoq.errors import StoreError
from autoq.studies._encoding import canonical_json, finite_or_none, iso_time, sha256_hex

SEAL = "row_sha256"
_OUTSIDE = ("id", SEAL)


class DamagedRowError(StoreError):
    """A row is not as it was written."""


class Sealed:
    """Base of the tables whose rows are sealed."""

    row_sha256: Mapped[str | None] = mapped_column(sort_order=1)


def sealed(table: type[Sealed], values: Mapping[str, Any]) -> dict[str, Any]:
    """Columns of a new row, with its seal: for statements that insert many rows at once."""
    return {**values, SEAL: _seal(table, values)}


def is_sealed(table: type[Sealed], values: Mapping[str, Any]) -> bool:
    """Whether the columns are what the row's seal was made of; a row without seal is not."""
    try:
        return bool(values[SEAL] == _seal(table, values))
    except (TypeError, ValueError, OverflowError, AttributeError, RecursionError):
        return False  # a value of another type than the column's


def name_of(table: type[Sealed], values: Mapping[str, Any]) -> str:
    """The row as messages name it: "measurement 'kl' of study 3"."""
    kind = str(table.__tablename__).replace("_", " ")  # type: ignore[attr-defined]
    shown = [repr(values[name]) for name in _NAMES if values.get(name) is not None]
    owner = f" of study {values['study_id']}" if "study_id" in values else ""
    return f"{kind} {', '.join(shown)}{owner}"


_NAMES = ("name", "stage", "label", "metric", "group_name", "format_name", "batch_index", "path")


def row_hash(table: str, values: Mapping[str, Any]) -> str:
    """The seal of plain values; stored seals rely on every character of what is hashed."""
    content = [table, dict(values)]
    try:
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError):  # paths, NumPy's numbers, NaN: as they will be stored
        text = canonical_json(content)
    return sha256_hex(text.encode())


def _seal(table: type[Sealed], values: Mapping[str, Any]) -> str:
    plain = {name: as_plain(values.get(name)) for name, as_plain in _sealed_columns(table)}
    return row_hash(str(table.__tablename__), plain)  # type: ignore[attr-defined]


def _sealed_columns(table: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    """The columns under the seal, and how a value looks whatever database it went through."""
    known = _SEALED_COLUMNS.get(table)
    if known is None:
        known = _SEALED_COLUMNS[table] = _columns_to_seal(table)
    return known


_SEALED_COLUMNS: dict[Any, list[tuple[str, Callable[[Any], Any]]]] = {}


def _columns_to_seal(table: Any) -> list[tuple[str, Callable[[Any], Any]]]:
    plain = [(column.name, _plain_form(column.type)) for column in table.__table__.columns]
    return [(name, form) for name, form in plain if form is not None and name not in _OUTSIDE]


def _plain_form(column_type: Any) -> Callable[[Any], Any] | None:
    kind = getattr(column_type, "impl_instance", column_type)
    for known, form in _FORMS:
        if isinstance(kind, known):
            return form
    return _text


def _number(value: float | None) -> float | None:
    # SQLite stores whole numbers as integers, which have no negative zero.
    return None if value is None else finite_or_none(float(value) + 0.0)


def _whole(value: int | None) -> int | None:
    return None if value is None else int(value)


def _text(value: str | None) -> str | None:
    return None if value is None else str(value)


def _time(value: datetime | None) -> str | None:
    if value is None:
        return None
    return iso_time(value.replace(tzinfo=UTC) if value.tzinfo is None else value)


def _same(value: Any) -> Any:
    return value


_FORMS: list[tuple[type, Callable[[Any], Any] | None]] = [
    (LargeBinary, None),
    (JSON, _same),
    (DateTime, _time),
    (Float, _number),
    (Integer, _whole),
]


@event.listens_for(Sealed, "before_insert", propagate=True)
@event.listens_for(Sealed, "before_update", propagate=True)
def _seal_what_is_written(_mapper: object, _connection: object, row: Sealed) -> None:
    row.row_sha256 = _seal(type(row), row.__dict__)


@event.listens_for(Sealed, "load", propagate=True)
def _verify_what_is_read(row: Sealed, _context: object) -> None:
    values = row.__dict__
    if not is_sealed(type(row), values):
        raise DamagedRowError(
            f"{name_of(type(row), values)} is damaged: it does not match the SHA-256 stored with it; "
            "`autoq store check` names what else is, so restore the store from a copy"
        )
