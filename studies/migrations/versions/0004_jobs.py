"""Jobs of the service: what was asked, how far it is, what happened, and which process runs it.

Revision ID: 0004
Revises: 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Create the tables."""
    _create_jobs()
    _create_events()
    op.create_table(
        "job_lease",
        sa.Column("id", IDENTIFIER, primary_key=True),
        sa.Column(
            "job_id",
            IDENTIFIER,
            sa.ForeignKey("job.id", ondelete="CASCADE"),
            nullable=False,
            unique=True,
        ),
        *_lease_columns(),
    )
    op.create_table("runner", sa.Column("id", IDENTIFIER, primary_key=True), *_lease_columns())


def downgrade() -> None:
    """Drop them, and with them every job; studies stay."""
    for table in ("runner", "job_lease", "job_event", "job"):
        op.drop_table(table)


def _create_jobs() -> None:
    op.create_table(
        "job",
        sa.Column("id", IDENTIFIER, primary_key=True),
        sa.Column("public_id", sa.String(), nullable=False, unique=True),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("status", sa.String(), nullable=False),
        sa.Column("study_name", sa.String(), nullable=True),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("request_sha256", sa.String(), nullable=False),
        sa.Column("created_by", sa.String(), nullable=False),
        sa.Column("idempotency_key", sa.String(), nullable=True),
        sa.Column("created", TIME, nullable=False),
        sa.Column("started", TIME, nullable=True),
        sa.Column("finished", TIME, nullable=True),
        sa.Column("attempts", sa.BigInteger(), nullable=False),
        sa.Column("deaths", sa.BigInteger(), nullable=False),
        sa.Column("worker", sa.String(), nullable=True),
        sa.Column("progress", sa.JSON(), nullable=True),
        sa.Column("problem", sa.JSON(), nullable=True),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.UniqueConstraint("created_by", "idempotency_key"),
    )
    op.create_index("ix_job_status", "job", ["status"])
    op.create_index("ix_job_study_name", "job", ["study_name"])


def _create_events() -> None:
    # Readers go on after the last id that they saw, so an id is never given twice.
    op.create_table(
        "job_event",
        sa.Column("id", IDENTIFIER, primary_key=True),
        sa.Column(
            "job_id", IDENTIFIER, sa.ForeignKey("job.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("time", TIME, nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("data", sa.JSON(), nullable=False),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_job_event_job_id_kind", "job_event", ["job_id", "kind"])


def _lease_columns() -> list[sa.Column[object]]:
    """Those of table `lease`: who holds it, and until when by which clock."""
    return [
        sa.Column("owner", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("pid_namespace", sa.String(), nullable=False),
        sa.Column("pid", sa.BigInteger(), nullable=False),
        sa.Column("process_started", sa.Double(), nullable=False),
        sa.Column("acquired", TIME, nullable=False),
        sa.Column("heartbeat", TIME, nullable=False),
        sa.Column("expires", TIME, nullable=False),
        sa.Column("boot_id", sa.String(), nullable=True),
        sa.Column("expires_uptime", sa.Double(), nullable=True),
    ]
