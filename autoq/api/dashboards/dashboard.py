"""Studies in Optuna's dashboard: their trials, notes, plots and files, and the page that shows them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from autoq.api.dashboards._annotation import annotate, check_dashboard_installed
from autoq.api.dashboards._files import checked_folder
from autoq.api.dashboards._trials import (
    existing_measured_plans,
    measured_plans_study,
    refinements,
)
from autoq.api.opening import list_studies, open_study
from autoq.api.study import Study
from autoq.errors import InputError, StudyLockedError, UnknownNameError
from autoq.studies import StudyStore, trial_storage

if TYPE_CHECKING:
    import optuna
    from _typeshed.wsgi import WSGIApplication

__all__ = [
    "PreparedStore",
    "annotate",
    "artifact_folder",
    "check_dashboard_installed",
    "dashboard_application",
    "prepare_store",
]


@dataclass(frozen=True, slots=True)
class PreparedStore:
    """What the dashboard shows of a store."""

    storage: optuna.storages.BaseStorage
    artifacts: Path
    shown: tuple[str, ...]  # names of Optuna studies
    skipped: tuple[tuple[str, str], ...]  # names of studies that cannot be shown yet, and why


def artifact_folder(store: StudyStore, folder: Path | None = None) -> Path:
    """Where artifacts of the store's studies are: the folder, or one beside the SQLite file.

    Raises:
        InputError: no folder is named, and the store is no SQLite file.
    """
    if folder is not None:
        return folder
    if store.file is None:
        raise InputError(
            f"artifacts of {store.described} need a folder, because only an SQLite file has one "
            "beside it; name one with --artifacts DIR"
        )
    return store.file.with_name(f"{store.file.name}.artifacts")


def prepare_store(
    store: str | StudyStore,
    artifacts: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> PreparedStore:
    """Give every study of the store its notes, plots and files in Optuna's tables.

    Refined studies have Optuna studies; of the others one is made, with the measured plans as
    trials. Preparing again changes only what has changed.

    Args:
        artifacts: folder for files; None is "<file>.artifacts" beside the SQLite file.
        say: told what is being prepared.
    Raises:
        InputError: packages are missing, the folder cannot be used, or the store has no study.
    """
    check_dashboard_installed()
    if isinstance(store, str):
        with StudyStore.open(store) as opened:
            return prepare_store(opened, artifacts, say)
    folder = checked_folder(artifact_folder(store, artifacts))
    names = [entry["name"] for entry in list_studies(store)]
    if not names:
        raise UnknownNameError(
            "the store has no study yet; make one with `autoq search MODEL --bits B`"
        )
    storage = trial_storage(store.url)
    shown: list[str] = []
    skipped: list[tuple[str, str]] = []
    for name in names:
        say(f"preparing {name}")
        study = open_study(name, store)
        try:
            for optuna_study in _optuna_studies(study, storage, say):
                annotate(study, optuna_study, artifacts=folder)
                shown.append(optuna_study.study_name)
        except (InputError, StudyLockedError) as error:
            skipped.append((name, str(error)))
    return PreparedStore(storage, folder, tuple(shown), tuple(skipped))


def dashboard_application(prepared: PreparedStore) -> WSGIApplication:
    """The dashboard of a prepared store, for `DashboardServer.serve` or any other WSGI server.

    It asks for no password, and can delete what Optuna keeps.
    """
    from optuna.artifacts import FileSystemArtifactStore
    from optuna_dashboard import wsgi

    application: WSGIApplication = wsgi(
        prepared.storage, artifact_store=FileSystemArtifactStore(prepared.artifacts)
    )
    return application


def _optuna_studies(
    study: Study, storage: optuna.storages.BaseStorage, say: Callable[[str], None]
) -> Iterator[optuna.Study]:
    refined = refinements(study, storage)
    yield from refined
    known = existing_measured_plans(study, storage)
    if refined and known is None:
        return
    study.plan()  # refuses before anything is made
    try:
        with study.store.lease(study.id):
            known = measured_plans_study(study, storage, say)
    except StudyLockedError:
        if known is None:
            raise
    assert known is not None  # it was made just now
    yield known
