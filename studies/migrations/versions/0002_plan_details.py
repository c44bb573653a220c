"""Plans keep the budgets that they were solved for, and what they take of every resource.

Revision ID: 0002
Revises: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

# Not in a batch: on SQLite that drops the old table, and measurements and exports with it, which
# refer to plans and go with them.


def upgrade() -> None:
    """Add the column; plans of earlier versions have no details."""
    op.add_column("plan", sa.Column("details", sa.JSON(), nullable=False, server_default="{}"))


def downgrade() -> None:
    """Drop the column, and with it what earlier versions did not know."""
    op.drop_column("plan", "details")
