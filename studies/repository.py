"""The study store: every step's result, as rows, as soon as it exists."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from autoq.studies._database import Database
from autoq.studies._results import ResultRepository
from autoq.studies._stages import StageRepository
from autoq.studies._studies import StudyRepository


class StudyStore(StudyRepository, StageRepository, ResultRepository):
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
        url = self._database.url
        is_file = url.get_backend_name() == "sqlite" and url.database not in (None, "", ":memory:")
        return Path(str(url.database)) if is_file else None

    @property
    def described(self) -> str:
        """The store as messages name it: without its password."""
        return self._database.described

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
