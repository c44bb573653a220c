"""Bytes of any size, kept once each under their SHA-256, in pieces that a database takes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from itertools import groupby
from typing import Any

from sqlalchemy import ColumnElement, delete, exists, insert, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from autoq.errors import StoreError
from autoq.studies._encoding import sha256_hex
from autoq.studies._schema import ArrayRow, BlobChunkRow, BlobRow

CHUNK_BYTES = 1 << 24
_HASHES_PER_STATEMENT = 256
_ATTEMPTS = 3


def put_blob(session: Session, data: bytes) -> str:
    """Keep the bytes, unless they are there, and return their SHA-256.

    Bytes that are there are compared with the given ones: a damaged blob is mended by whoever
    computes it again.
    """
    sha256 = sha256_hex(data)
    for _ in range(_ATTEMPTS):
        blob_id = _insert_unless_there(session, sha256, len(data))
        if blob_id is not None:
            _write_chunks(session, blob_id, data)
            return sha256
        found = _locked(session, sha256)
        if found is not None:
            _mend(session, found, data)
            return sha256
    raise StoreError(
        f"blob {sha256} is written and removed by other processes all the time; run again"
    )


def blob_bytes(session: Session, hashes: Iterable[str]) -> Iterator[tuple[str, bytes]]:
    """(SHA-256, bytes) of blobs; one that is missing is left out, and nothing is verified."""
    wanted = sorted(set(hashes))
    for start in range(0, len(wanted), _HASHES_PER_STATEMENT):
        part = wanted[start : start + _HASHES_PER_STATEMENT]
        rows = (
            select(BlobRow.sha256, BlobChunkRow.data)
            .outerjoin(BlobChunkRow, BlobChunkRow.blob_id == BlobRow.id)
            .where(BlobRow.sha256.in_(part))
            .order_by(BlobRow.sha256, BlobChunkRow.position)
        )
        found = session.execute(rows)
        for sha256, chunks in groupby(found, key=lambda row: row[0]):
            yield sha256, b"".join(bytes(data) for _, data in chunks if data is not None)


def drop_unused(session: Session, hashes: Collection[str]) -> None:
    """Remove those of the blobs that no row refers to any more."""
    wanted = sorted(set(hashes))
    for start in range(0, len(wanted), _HASHES_PER_STATEMENT):
        part = BlobRow.sha256.in_(wanted[start : start + _HASHES_PER_STATEMENT])
        # Locked first: the next statement then sees who began to use one in the meantime.
        session.execute(select(BlobRow.id).where(part).order_by(BlobRow.sha256).with_for_update())
        session.execute(delete(BlobRow).where(part, is_unused()))


def is_unused() -> ColumnElement[bool]:
    """Whether no row refers to a blob."""
    return ~exists().where(ArrayRow.sha256 == BlobRow.sha256)


def _insert_unless_there(session: Session, sha256: str, size_bytes: int) -> int | None:
    """The id of the new row; None where another process or an earlier call has made it."""
    make: Any = sqlite.insert
    if session.get_bind().dialect.name == "postgresql":
        make = postgresql.insert
    values = {"sha256": sha256, "size_bytes": size_bytes}
    statement = make(BlobRow).values(**values).on_conflict_do_nothing().returning(BlobRow.id)
    blob_id: int | None = session.execute(statement).scalar()
    return blob_id


def _write_chunks(session: Session, blob_id: int, data: bytes) -> None:
    for position, start in enumerate(range(0, len(data), CHUNK_BYTES)):
        chunk = {
            "blob_id": blob_id,
            "position": position,
            "data": data[start : start + CHUNK_BYTES],
        }
        session.execute(insert(BlobChunkRow), [chunk])


def _locked(session: Session, sha256: str) -> int | None:
    """The id of the blob, which nobody removes until this transaction ends; None: it is gone."""
    query = select(BlobRow.id).where(BlobRow.sha256 == sha256)
    return session.scalar(query.with_for_update(read=True, key_share=True))


def _mend(session: Session, blob_id: int, data: bytes) -> None:
    chunks = select(BlobChunkRow.data).where(BlobChunkRow.blob_id == blob_id)
    stored = session.scalars(chunks.order_by(BlobChunkRow.position))
    if b"".join(bytes(chunk) for chunk in stored) == data:
        return
    session.execute(delete(BlobChunkRow).where(BlobChunkRow.blob_id == blob_id))
    _write_chunks(session, blob_id, data)
