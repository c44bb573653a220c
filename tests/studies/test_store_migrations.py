"""Databases of every released schema, brought to today's and back, in SQLite."""

from __future__ import annotations

import sqlite3

import pytest
from alembic.script import ScriptDirectory

from autoq.studies import StudyStore, _migrate
from autoq.studies._schema import SCHEMA_REVISION
from tests.studies.frozen_stores import (
    REVISIONS,
    check_contents,
    contents,
    migrate,
    schema_differences,
    thaw_sqlite,
)


@pytest.fixture
def url(store_path):
    return f"sqlite:///{store_path}"


def test_the_newest_revision_is_the_one_that_needs_no_migration():
    scripts = ScriptDirectory(str(_migrate._SCRIPTS))
    assert scripts.get_current_head() == SCHEMA_REVISION


def test_every_released_schema_is_frozen():
    scripts = ScriptDirectory(str(_migrate._SCRIPTS))
    assert sorted(script.revision for script in scripts.walk_revisions()) == REVISIONS


@pytest.mark.parametrize("revision", REVISIONS)
def test_a_frozen_database_opens_with_everything_in_it(revision, store_path, url):
    thaw_sqlite(revision, store_path)
    check_contents(revision, url)
    assert schema_differences(url) == []
    with sqlite3.connect(store_path) as connection:
        assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()


@pytest.mark.parametrize("revision", REVISIONS)
def test_up_and_down_again_gives_the_frozen_rows(revision, store_path, url):
    thaw_sqlite(revision, store_path)
    before = contents(url)
    migrate(url, SCHEMA_REVISION)
    migrate(url, revision)
    assert contents(url) == before


def test_all_the_way_down_leaves_no_table(store_path, url):
    thaw_sqlite(REVISIONS[-1], store_path)
    migrate(url, SCHEMA_REVISION)
    migrate(url, "base")
    assert contents(url) == {}


def test_an_upgrade_that_fails_changes_nothing(store_path, url, monkeypatch):
    thaw_sqlite("0002", store_path)
    before = contents(url)

    def fail(*_):
        raise RuntimeError("pulled the plug")

    monkeypatch.setattr("alembic.command.upgrade", _after(fail))
    with pytest.raises(RuntimeError, match="pulled the plug"):
        StudyStore.open(url)
    assert contents(url) == before


def _after(fail):
    """Alembic's upgrade, and then a failure, in the transaction of the upgrade."""
    from alembic import command

    upgrade = command.upgrade

    def both(*arguments):
        upgrade(*arguments)
        fail()

    return both
