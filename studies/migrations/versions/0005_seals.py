"""Rows get a hash of what they say, and those that are there are sealed as they are.

A row that cannot be read gets none, and counts as damaged.

Revision ID: 0005
Revises: 0004
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from alembic import op

from autoq.studies._encoding import finite_or_none, iso_time
from autoq.studies._seals import row_hash

revision = "0005"
down_revision = "0004"

ROWS_AT_A_TIME = 512

TEXT, WHOLE = sa.String(), sa.BigInteger()
NUMBER: sa.Double[float] = sa.Double()
TIME, PLAIN = sa.DateTime(timezone=True), sa.JSON()

# What is under the seal, in this revision: all columns but the row's number and bytes.
TABLES: dict[str, dict[sa.types.TypeEngine[Any], str]] = {
    "study": {
        TEXT: "name key status model_path model_fingerprint architecture",
        TIME: "created updated",
        PLAIN: "configuration versions",
        WHOLE: "seed schema_version",
    },
    "stage": {
        TEXT: "name status fingerprint",
        TIME: "started finished",
        NUMBER: "seconds",
        PLAIN: "payload",
        WHOLE: "study_id",
    },
    "stored_array": {TEXT: "stage name dtype sha256", PLAIN: "shape", WHOLE: "study_id"},
    "score_batch": {TEXT: "sha256", NUMBER: "seconds", WHOLE: "study_id batch_index"},
    "sensitivity": {
        TEXT: "group_name format_name",
        NUMBER: "score standard_error",
        WHOLE: "study_id",
    },
    "plan": {
        TEXT: "label content_sha256",
        TIME: "created",
        NUMBER: "budget_bits effective_bits peer_effective_bits stored_bits_per_weight "
        "predicted_loss predicted_loss_low predicted_loss_high bound gap",
        PLAIN: "assignment details",
        WHOLE: "study_id stored_bytes",
    },
    "measurement": {
        TEXT: "label metric data_sha256",
        TIME: "created",
        NUMBER: "value interval_low interval_high",
        PLAIN: "details",
        WHOLE: "study_id plan_id tokens",
    },
    "export": {
        TEXT: "container path status",
        TIME: "started finished",
        PLAIN: "verification",
        WHOLE: "study_id plan_id bytes_written",
    },
    "export_file": {TEXT: "path sha256", WHOLE: "export_id size_bytes"},
}


def upgrade() -> None:
    """Add the column, and seal what is there."""
    for name, columns in TABLES.items():
        op.add_column(name, sa.Column("row_sha256", sa.String(), nullable=True))
        table = sa.table(
            name,
            sa.column("id", WHOLE),
            sa.column("row_sha256", TEXT),
            *(sa.column(one, kind) for kind, names in columns.items() for one in names.split()),
        )
        _seal(table)


def downgrade() -> None:
    """Drop the column."""
    for name in TABLES:
        op.drop_column(name, "row_sha256")


def _seal(table: sa.TableClause) -> None:
    connection = op.get_bind()
    next_ids = sa.select(table.c.id).order_by(table.c.id).limit(ROWS_AT_A_TIME)
    change = (
        table.update()
        .where(table.c.id == sa.bindparam("of_row"))
        .values(row_sha256=sa.bindparam("seal"))
    )
    ids = connection.scalars(next_ids).all()
    while ids:
        seals = [{"of_row": row_id, "seal": seal} for row_id, seal in _read(connection, table, ids)]
        if seals:
            connection.execute(change, seals)
        ids = connection.scalars(next_ids.where(table.c.id > ids[-1])).all()


def _read(connection: sa.Connection, table: sa.TableClause, ids: Any) -> Iterator[tuple[int, str]]:
    """(number, seal) of rows; of those that hold what their columns cannot, nothing."""
    columns = [column for column in table.columns if column.name != "row_sha256"]
    query = sa.select(*columns)
    try:
        rows = connection.execute(query.where(table.c.id.in_(ids))).mappings().all()
        sealed = [(row["id"], row_hash(table.name, _plain(table, row))) for row in rows]
    except (ValueError, TypeError, OverflowError, RecursionError, sa.exc.OperationalError):
        if len(ids) > 1:
            for row_id in ids:
                yield from _read(connection, table, [row_id])
        return
    yield from sealed


def _plain(table: sa.TableClause, row: Any) -> dict[str, Any]:
    return {
        column.name: _plain_value(column.type, row[column.name])
        for column in table.columns
        if column.name not in ("id", "row_sha256")
    }


def _plain_value(kind: sa.types.TypeEngine[Any], value: Any) -> Any:
    if value is None or kind is PLAIN:
        return value
    if kind is TIME:
        moment: datetime = value
        return iso_time(moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment)
    if kind is NUMBER:
        return finite_or_none(float(value) + 0.0)
    return int(value) if kind is WHOLE else str(value)
