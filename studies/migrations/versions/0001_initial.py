"""The first schema: studies, their stages and everything the stages leave behind.

Revision ID: 0001
Revises: nothing
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

TABLES = (
    "study",
    "stage",
    "stored_array",
    "score_batch",
    "sensitivity",
    "plan",
    "measurement",
    "export",
    "export_file",
    "lease",
)


def upgrade() -> None:
    """Create all tables, parents first."""
    _create_study_and_stage()
    _create_arrays_and_scores()
    _create_plan_and_measurement()
    _create_exports()
    _create_lease()


def downgrade() -> None:
    """Drop all tables, children first."""
    for table in reversed(TABLES):
        op.drop_table(table)


def _identifier() -> sa.Column[int]:
    return sa.Column("id", IDENTIFIER, primary_key=True)


def _reference(
    table: str, *, nullable: bool = False, index: bool = False, unique: bool = False
) -> sa.Column[int]:
    return sa.Column(
        f"{table}_id",
        IDENTIFIER,
        sa.ForeignKey(f"{table}.id", ondelete="CASCADE"),
        nullable=nullable,
        index=index,
        unique=unique,
    )


def _text(name: str, *, nullable: bool = False, unique: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(), nullable=nullable, unique=unique)


def _integer(name: str, *, nullable: bool = False) -> sa.Column[int]:
    return sa.Column(name, sa.BigInteger(), nullable=nullable)


def _double(name: str, *, nullable: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _json(name: str) -> sa.Column[object]:
    return sa.Column(name, sa.JSON(), nullable=False)


def _binary(name: str) -> sa.Column[bytes]:
    return sa.Column(name, sa.LargeBinary(), nullable=False)


def _create_study_and_stage() -> None:
    op.create_table(
        "study",
        _identifier(),
        _text("name", unique=True),
        _text("key", unique=True),
        _text("status"),
        _time("created"),
        _time("updated"),
        _text("model_path"),
        _text("model_fingerprint"),
        _text("architecture"),
        _json("configuration"),
        _json("versions"),
        _integer("seed"),
        _integer("schema_version"),
    )
    op.create_table(
        "stage",
        _identifier(),
        _reference("study"),
        _text("name"),
        _text("status"),
        _time("started", nullable=True),
        _time("finished", nullable=True),
        _double("seconds", nullable=True),
        _json("payload"),
        sa.UniqueConstraint("study_id", "name"),
    )


def _create_arrays_and_scores() -> None:
    op.create_table(
        "stored_array",
        _identifier(),
        _reference("study"),
        _text("stage"),
        _text("name"),
        _text("dtype"),
        _json("shape"),
        _binary("data"),
        _text("sha256"),
        sa.UniqueConstraint("study_id", "stage", "name"),
    )
    op.create_table(
        "score_batch",
        _identifier(),
        _reference("study"),
        _integer("batch_index"),
        _binary("data"),
        _text("sha256"),
        _double("seconds"),
        sa.UniqueConstraint("study_id", "batch_index"),
    )
    op.create_table(
        "sensitivity",
        _identifier(),
        _reference("study"),
        _text("group_name"),
        _text("format_name"),
        _double("score", nullable=True),
        _double("standard_error", nullable=True),
        sa.UniqueConstraint("study_id", "group_name", "format_name"),
    )


def _create_plan_and_measurement() -> None:
    op.create_table(
        "plan",
        _identifier(),
        _reference("study"),
        _text("label"),
        _time("created"),
        _double("budget_bits"),
        _double("effective_bits"),
        _double("peer_effective_bits"),
        _double("stored_bits_per_weight"),
        _integer("stored_bytes"),
        _double("predicted_loss", nullable=True),
        _double("predicted_loss_low", nullable=True),
        _double("predicted_loss_high", nullable=True),
        _double("bound", nullable=True),
        _double("gap", nullable=True),
        _json("assignment"),
        _text("content_sha256"),
        sa.UniqueConstraint("study_id", "content_sha256"),
    )
    op.create_table(
        "measurement",
        _identifier(),
        _reference("study", index=True),
        _reference("plan", nullable=True),
        _text("label"),
        _text("metric"),
        _double("value", nullable=True),
        _double("interval_low", nullable=True),
        _double("interval_high", nullable=True),
        _json("details"),
        _integer("tokens", nullable=True),
        _text("data_sha256", nullable=True),
        _time("created"),
    )


def _create_exports() -> None:
    op.create_table(
        "export",
        _identifier(),
        _reference("study", index=True),
        _reference("plan"),
        _text("container"),
        _text("path"),
        _text("status"),
        _integer("bytes_written", nullable=True),
        _json("verification"),
        _time("started"),
        _time("finished", nullable=True),
    )
    op.create_table(
        "export_file",
        _identifier(),
        _reference("export"),
        _text("path"),
        _integer("size_bytes"),
        _text("sha256"),
        sa.UniqueConstraint("export_id", "path"),
    )


def _create_lease() -> None:
    op.create_table(
        "lease",
        _identifier(),
        _reference("study", unique=True),
        _text("owner"),
        _text("host"),
        _text("pid_namespace"),
        _integer("pid"),
        _double("process_started"),
        _time("acquired"),
        _time("heartbeat"),
        _time("expires"),
    )
