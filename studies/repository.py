"""The study store: every step's result, as rows, as soon as it exists."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from autoq.studies._database import Database, file_of
from autoq.studies._deletion import DeletionRepository
from autoq.studies._job_claims import JobClaimRepository
from autoq.studies._job_events import JobEventRepository
from autoq.studies._jobs import JobRepository
from autoq.studies._pages import PageRepository
from autoq.studies._results import ResultRepository
from autoq.studies._reuse import ReuseRepository
from autoq.studies._stages import StageRepository
from autoq.studies._studies import StudyRepository
from autoq.studies._trial_pages import TrialPageRepository


class StudyStore(
    StudyRepository,
    StageRepository,
    ReuseRepository,
    ResultRepository,
    JobRepository,
    JobClaimRepository,
    JobEventRepository,
    DeletionRepository,
    PageRepository,
    TrialPageRepository,
):
    """One open database of studies.

    Every method is one transaction: what it returned from is on disk whole, and what was
    interrupted left nothing. Any number of processes may have the store open; whoever works on a
    study holds its `lease`. Records that come back are snapshots. NaN and infinite numbers are
    stored as NULL, except inside arrays, which come back bit for bit.
    """

    @classmethod
    def open(cls, url: str) -> Self:
        """Open the store, creating the file and its tables where there are none.

        Args:
            url: a file path, or a URL such as sqlite:///autoq.db.
        Raises:
            StoreError: the place cannot be used: unwritable, not a database, full disk, or
                written by a newer version of autoq.
        """
        return cls(Database.open(url))

    @property
    def url(self) -> str:
        """The URL with an absolute path and with its password: for Optuna, not for printing."""
        return self._database.url.render_as_string(hide_password=False)

    @property
    def file(self) -> Path | None:
        """The SQLite file that the store is; None for other databases and in memory."""
        return file_of(self.url)

    @property
    def described(self) -> str:
        """The store as messages name it: without its password."""
        return self._database.described

    def export(self, study_id: int, path: Path) -> int:
        """Write a study to one portable file, and return the file's size in bytes.

        Raises:
            InputError: the path is taken, or something in the study is damaged.
            StoreError: the database failed.
        """
        from autoq.studies._portable import export_study

        return export_study(self._database, study_id, path)

    def import_file(self, path: Path, name: str | None = None) -> str:
        """Put the study of a portable file into the store, and return its name.

        Args:
            name: another than the file says.
        Raises:
            InputError: the file cannot be used, or the study or its name is there already.
            StoreError: the database failed.
        """
        from autoq.studies._import import import_study

        return import_study(self._database, path, name)

    def close(self) -> None:
        """Give the connections back; the store cannot be used afterwards."""
        self._database.close()

    def __enter__(self) -> Self:
        """The store itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the store."""
        self.close()
