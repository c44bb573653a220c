"""Arrays are kept once each, as blobs named by their hash; stages and leases say more.

Stages have the fingerprint of all that their result depends on, by which another study finds and
takes it over. Leases have a clock that nobody sets: see `_leases`.

Revision ID: 0003
Revises: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

IDENTIFIER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
CHUNK_BYTES = 1 << 24
ARRAY_TO_BLOB = "fk_stored_array_sha256_blob"


def upgrade() -> None:
    """Move the arrays into blobs, and add the columns."""
    _create_blobs()
    _move_into_blobs()
    # The table may be copied: nothing refers to it.
    with op.batch_alter_table("stored_array") as table:
        table.drop_column("data")
        table.create_foreign_key(ARRAY_TO_BLOB, "blob", ["sha256"], ["sha256"])
    op.create_index("ix_stored_array_sha256", "stored_array", ["sha256"])
    op.add_column("stage", sa.Column("fingerprint", sa.String(), nullable=True))
    op.create_index("ix_stage_fingerprint", "stage", ["fingerprint"])
    op.add_column("lease", sa.Column("boot_id", sa.String(), nullable=True))
    op.add_column("lease", sa.Column("expires_uptime", sa.Double(), nullable=True))


def downgrade() -> None:
    """Put the arrays back into their rows, and drop the columns."""
    op.drop_column("lease", "expires_uptime")
    op.drop_column("lease", "boot_id")
    op.drop_index("ix_stage_fingerprint", "stage")
    op.drop_column("stage", "fingerprint")
    op.drop_index("ix_stored_array_sha256", "stored_array")
    with op.batch_alter_table("stored_array") as table:
        table.drop_constraint(ARRAY_TO_BLOB, type_="foreignkey")
        table.add_column(sa.Column("data", sa.LargeBinary(), nullable=True))
    _move_out_of_blobs()
    with op.batch_alter_table("stored_array") as table:
        table.alter_column("data", existing_type=sa.LargeBinary(), nullable=False)
    op.drop_table("blob_chunk")
    op.drop_table("blob")


def _create_blobs() -> None:
    op.create_table(
        "blob",
        sa.Column("id", IDENTIFIER, primary_key=True),
        sa.Column("sha256", sa.String(), nullable=False, unique=True),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "blob_chunk",
        sa.Column("id", IDENTIFIER, primary_key=True),
        sa.Column(
            "blob_id", IDENTIFIER, sa.ForeignKey("blob.id", ondelete="CASCADE"), nullable=False
        ),
        sa.Column("position", sa.BigInteger(), nullable=False),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        sa.UniqueConstraint("blob_id", "position"),
    )


def _move_into_blobs() -> None:
    """Within the database: no array passes through this process."""
    connection = op.get_bind()
    connection.execute(
        sa.text(
            "INSERT INTO blob (sha256, size_bytes) SELECT sha256, length(data) FROM stored_array "
            "WHERE id IN (SELECT min(id) FROM stored_array GROUP BY sha256) ORDER BY id"
        )
    )
    largest = connection.execute(sa.text("SELECT max(size_bytes) FROM blob")).scalar() or 0
    for position in range(-(-largest // CHUNK_BYTES)):
        connection.execute(
            sa.text(
                "INSERT INTO blob_chunk (blob_id, position, data) "
                f"SELECT blob.id, {position}, substr(stored_array.data, "
                f"{position * CHUNK_BYTES + 1}, {CHUNK_BYTES}) "
                "FROM blob JOIN stored_array ON stored_array.id = (SELECT min(same.id) "
                "FROM stored_array AS same WHERE same.sha256 = blob.sha256) "
                f"WHERE blob.size_bytes > {position * CHUNK_BYTES} ORDER BY blob.id"
            )
        )


def _move_out_of_blobs() -> None:
    connection = op.get_bind()
    arrays = sa.table("stored_array", sa.column("id"), sa.column("sha256"), sa.column("data"))
    blobs = sa.table("blob", sa.column("id"), sa.column("sha256"))
    chunks = sa.table("blob_chunk", sa.column("blob_id"), sa.column("position"), sa.column("data"))
    for blob_id, sha256 in connection.execute(sa.select(blobs.c.id, blobs.c.sha256)).all():
        of_blob = sa.select(chunks.c.data).where(chunks.c.blob_id == blob_id)
        parts = connection.scalars(of_blob.order_by(chunks.c.position)).all()
        data = b"".join(bytes(part) for part in parts)
        connection.execute(arrays.update().where(arrays.c.sha256 == sha256).values(data=data))
