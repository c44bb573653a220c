"""Where Optuna keeps the trials of a refinement: tables of its own in the store's database."""

from __future__ import annotations

import json
import math
import os
import socket
import time
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

import psutil  # type: ignore[import-untyped]
from sqlalchemy import Delete, Engine, delete, event, make_url, text
from sqlalchemy.exc import (
    ArgumentError,
    IntegrityError,
    OperationalError,
    ProgrammingError,
    SQLAlchemyError,
)
from sqlalchemy.orm import Session

from autoq.studies._leases import START_TOLERANCE_SECONDS, pid_namespace, process_started

if TYPE_CHECKING:
    from optuna import Study as OptunaStudy
    from optuna.storages import BaseStorage, RDBStorage
    from optuna.trial import FrozenTrial

WORKER = "worker"
"""User attribute of a trial: who measures it."""

HEARTBEAT_SECONDS = 10
"""How often a worker says that its trial is alive."""

GRACE_SECONDS = 60
"""After so long without a sign the worker counts as dead, and its trial is tried again."""

_MOST_RETRIES = 3
_MOST_COLLISIONS = 10  # as many tables as Optuna makes
_BETWEEN_COLLISIONS_SECONDS = 0.05
_BUSY_TIMEOUT_SECONDS = 60
_LONGEST_REASON = 160  # characters


def trial_storage(
    url: str,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    grace_seconds: int = GRACE_SECONDS,
) -> BaseStorage:
    """Optuna's storage in the store's database; its tables are made where there are none.

    Trials of workers that died come back as waiting ones, with what was known of them, when the
    next trial starts in `optuna.study.Study.optimize`. A store in memory has trials in memory,
    for this process alone.

    Args:
        url: `StudyStore.url`.
        heartbeat_seconds: between a running trial's signs of life.
        grace_seconds: of silence, until a trial is tried again.
    """
    import optuna
    from optuna.exceptions import ExperimentalWarning

    is_sqlite = make_url(url).get_backend_name() == "sqlite"
    if is_in_memory(url):
        return optuna.storages.InMemoryStorage()
    options: dict[str, Any] = {}
    if is_sqlite:
        options["connect_args"] = {"timeout": _BUSY_TIMEOUT_SECONDS}

    def opened() -> RDBStorage:
        return optuna.storages.RDBStorage(
            url,
            engine_kwargs=dict(options),
            heartbeat_interval=heartbeat_seconds,
            grace_period=grace_seconds,
            heartbeat_stale_trial_callback=_try_again,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        storage = _created_by_somebody(opened)
    if is_sqlite:
        _sync_less(storage.engine)
    return storage


def _created_by_somebody(opened: Callable[[], RDBStorage]) -> RDBStorage:
    """The storage, whichever process makes its tables.

    Optuna looks for each table and makes it when there is none, without a lock. Of processes that
    do so at the same instant all but one fail at some table; looking again, they find it.
    """
    for attempt in range(_MOST_COLLISIONS):
        try:
            return opened()
        except (IntegrityError, OperationalError, ProgrammingError):
            time.sleep(_BETWEEN_COLLISIONS_SECONDS * (attempt + 1))
    return opened()


def _try_again(study: OptunaStudy, trial: FrozenTrial) -> None:
    """Let a trial wait for another worker; of the dead one nothing may be left in it."""
    import optuna
    from optuna.exceptions import ExperimentalWarning

    left = {name: value for name, value in trial.user_attrs.items() if name != WORKER}
    trial.user_attrs = left
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        retry = optuna.storages.RetryHeartbeatStaleTrialCallback(max_retry=_MOST_RETRIES)
    retry(study, trial)


def is_in_memory(url: str) -> bool:
    """Whether the store ends with this process, and no other sees it."""
    try:
        parsed = make_url(url)
    except ArgumentError:
        return False  # whoever opens it says what is wrong
    return parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:")


def grace_seconds_of(storage: BaseStorage) -> float:
    """After how long a silence a trial of this storage is tried again; endless in memory."""
    return float(getattr(_uncached(storage), "grace_period", math.inf))


def _uncached(storage: BaseStorage) -> Any:
    """A study's storage is one that keeps finished trials, in front of that in the database."""
    return getattr(storage, "_backend", storage)


def has_heartbeat(storage: BaseStorage, trial_id: int) -> bool:
    """Whether the trial ever gave a sign of life.

    One that did not belongs to a worker that died between making it and working on it; Optuna
    never finds those.
    """
    engine = getattr(_uncached(storage), "engine", None)
    if engine is None:
        return True  # in memory: the worker is this process
    query = text("SELECT count(*) FROM trial_heartbeats WHERE trial_id = :trial_id")
    with engine.connect() as connection:
        return bool(connection.execute(query, {"trial_id": trial_id}).scalar())


def rewrite_finished_trials(
    storage: BaseStorage, complete: Mapping[int, FrozenTrial], withdrawn: Collection[int]
) -> str:
    """Give finished trials other numbers, all or none; their notes, files and places stay.

    Optuna has no call for that: it never changes a finished trial. So this writes its tables, as
    its own private classes describe them.

    Args:
        storage: of a store that is a file or a database.
        complete: Optuna's id of a trial -> the values, user attributes and times that it gets.
        withdrawn: ids of trials that no longer say anything; they count as failed.
    Returns:
        Why nothing was changed, as with a version of Optuna that keeps trials otherwise; nothing
        where all was.
    """
    try:
        _rewrite(_uncached(storage).engine, complete, withdrawn)
    except (ImportError, AttributeError, TypeError, SQLAlchemyError) as error:
        import optuna

        line = " ".join(str(error).split())[:_LONGEST_REASON]
        return f"the tables of Optuna {optuna.__version__} were not as expected ({line})"
    return ""


def _rewrite(
    engine: Engine, complete: Mapping[int, FrozenTrial], withdrawn: Collection[int]
) -> None:
    from optuna.storages._rdb import models
    from optuna.trial import TrialState

    finite = models.TrialValueModel.TrialValueType.FINITE
    with Session(engine) as session, session.begin():
        for trial_id in [*complete, *withdrawn]:
            session.execute(_of_trial(models.TrialValueModel, trial_id))
            row = session.get_one(models.TrialModel, trial_id)
            row.state = TrialState.COMPLETE if trial_id in complete else TrialState.FAIL
        for trial_id, trial in complete.items():
            row = session.get_one(models.TrialModel, trial_id)
            row.datetime_start = trial.datetime_start
            row.datetime_complete = trial.datetime_complete
            session.execute(_of_trial(models.TrialUserAttributeModel, trial_id))
            session.add_all(
                models.TrialValueModel(
                    trial_id=trial_id, objective=objective, value=value, value_type=finite
                )
                for objective, value in enumerate(trial.values)
            )
            session.add_all(
                models.TrialUserAttributeModel(
                    trial_id=trial_id, key=name, value_json=json.dumps(value)
                )
                for name, value in trial.user_attrs.items()
            )


def _of_trial(table: Any, trial_id: int) -> Delete:
    return delete(table).where(table.trial_id == trial_id)


def worker_identity() -> str:
    """This process, told from all others on any machine."""
    pid = os.getpid()
    return json.dumps([socket.gethostname(), pid_namespace(), pid, process_started(pid) or 0.0])


def worker_is_gone(identity: str) -> bool:
    """Whether the process is known to have ended; of other machines nothing is known."""
    host, namespace, pid, started = json.loads(identity)
    if (host, namespace) != (socket.gethostname(), pid_namespace()):
        return False
    try:
        found = process_started(pid)
    except psutil.AccessDenied:
        return False  # it exists, and belongs to someone else
    return found is None or abs(found - started) > START_TOLERANCE_SECONDS


def _sync_less(engine: Engine) -> None:
    """As the store itself does: in WAL mode a power cut costs the last trials, never the file.

    Optuna commits every attribute by itself, and full synchronisation made a trial ten times
    slower to store.
    """

    def set_pragmas(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA synchronous = NORMAL")

    event.listen(engine, "connect", set_pragmas)
    engine.dispose()  # connections of before know nothing of it
