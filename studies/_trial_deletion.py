"""The trials of a study that goes, taken out of Optuna's tables in the same transaction.

Optuna finds them by a name that begins with the study's: left there, they would be taken for those
of a new study of that name, whose model and data are others.
"""

from __future__ import annotations

import json

from sqlalchemy import Row, bindparam, inspect, text
from sqlalchemy.orm import Session

from autoq.errors import StudyLockedError
from autoq.studies._trial_pages import OWNER, TABLES
from autoq.studies._trials import GRACE_SECONDS, WORKER, worker_is_gone

_OF_TRIALS = (
    "trial_user_attributes",
    "trial_system_attributes",
    "trial_params",
    "trial_values",
    "trial_intermediate_values",
    "trial_heartbeats",
)
_OF_STUDIES = (
    "trials",
    "study_directions",
    "study_user_attributes",
    "study_system_attributes",
    "studies",
)
"""Rows before those that they refer to: Optuna's tables delete nothing by themselves."""

_OWNED = text("SELECT study_id FROM study_user_attributes WHERE key = :key AND value_json = :owner")
_SINCE = {
    "sqlite": f"datetime('now', '-{GRACE_SECONDS} seconds')",
    "postgresql": f"now() - interval '{GRACE_SECONDS} seconds'",
}
_AT_WORK = (
    "SELECT trials.number, studies.study_name, worker.value_json AS worker FROM trials "
    "JOIN studies ON studies.study_id = trials.study_id "
    "JOIN trial_heartbeats AS sign ON sign.trial_id = trials.trial_id "
    "LEFT JOIN trial_user_attributes AS worker "
    "ON worker.trial_id = trials.trial_id AND worker.key = :worker "
    "WHERE trials.study_id IN :studies AND trials.state = 'RUNNING' AND sign.heartbeat > {since}"
)


def delete_trials(session: Session, study_name: str) -> None:
    """Delete every Optuna study that belongs to a study: its refinements, its measured plans.

    Raises:
        StudyLockedError: a worker measures one of the trials.
    """
    tables = set(inspect(session.connection()).get_table_names())
    if not tables >= TABLES:
        return  # nothing was ever refined in this store
    owned = session.execute(_OWNED, {"key": OWNER, "owner": json.dumps(study_name)})
    studies = list(owned.scalars())
    if not studies:
        return
    _refuse_at_work(session, studies)
    of_trials = "trial_id IN (SELECT trial_id FROM trials WHERE study_id IN :studies)"
    for names, rows in ((_OF_TRIALS, of_trials), (_OF_STUDIES, "study_id IN :studies")):
        for table in names:
            if table in tables:
                _execute(session, f"DELETE FROM {table} WHERE {rows}", studies)


def _refuse_at_work(session: Session, studies: list[int]) -> None:
    since = _SINCE[session.get_bind().dialect.name]
    query = text(_AT_WORK.format(since=since)).bindparams(bindparam("studies", expanding=True))
    for row in session.execute(query, {"studies": studies, "worker": WORKER}):
        if not _is_gone(row):
            raise StudyLockedError(
                "a study is deleted when no process works on it, and trial "
                f"{row.number} of {row.study_name!r} is being measured; stop the refinement, and "
                f"where its processes were killed on another machine wait {GRACE_SECONDS} s"
            )


def _is_gone(row: Row[tuple[int, str, str | None]]) -> bool:
    try:
        return row.worker is not None and worker_is_gone(json.loads(row.worker))
    except (ValueError, TypeError):  # an attribute that is damaged says nothing
        return False


def _execute(session: Session, statement: str, studies: list[int]) -> None:
    expanded = text(statement).bindparams(bindparam("studies", expanding=True))
    session.execute(expanded, {"studies": studies})
