"""Run by Alembic, on the connection (and inside the transaction) that the store hands over."""

from __future__ import annotations

from alembic import context

from autoq.studies._schema import VERSION_TABLE, Base


def is_ours(name: str | None, kind: str, parents: object) -> bool:
    """Other programs' tables, Optuna's for one, live in the same database."""
    return kind != "table" or name in Base.metadata.tables


context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    version_table=VERSION_TABLE,
    include_name=is_ours,
    transactional_ddl=True,
    render_as_batch=True,  # SQLite alters a table by copying it
)
with context.begin_transaction():
    context.run_migrations()
