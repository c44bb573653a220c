"""Artifacts of Optuna studies: files below one folder, with their names in the database."""

from __future__ import annotations

import io
import json
import mimetypes
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from autoq.errors import InputError

if TYPE_CHECKING:
    import optuna

_OF_STUDY = "artifacts:"
_OF_TRIAL = "dashboard:artifacts:{trial_id}:"
"""Keys of the study's attributes. Optuna keeps a trial's artifacts with the trial, which cannot be
changed once it is finished; the dashboard also reads them here."""

_TRIAL_KEY = re.compile(_OF_TRIAL.format(trial_id=r"(\d+)"))
_IDENTIFIER = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


class ArtifactFiles:
    """The artifacts of one Optuna study and its trials.

    A file that is put again under its name replaces the former, and is not written if it is the
    same: putting twice changes nothing.
    """

    def __init__(self, study: optuna.Study, folder: Path) -> None:
        """
        Args:
            folder: where the files are; made if it is not there.
        Raises:
            InputError: it cannot be made.
        """
        from optuna.artifacts import FileSystemArtifactStore

        checked_folder(folder)
        self._files = FileSystemArtifactStore(folder)
        self._storage, self._study_id = study._storage, study._study_id

    def put(self, files: dict[str, bytes], trial_id: int | None = None) -> None:
        """Attach files to the study, or to one of its trials.

        Args:
            files: name -> content.
            trial_id: Optuna's number of the trial in its database.
        Raises:
            OSError: the folder cannot be written.
        """
        prefix = _OF_STUDY if trial_id is None else _OF_TRIAL.format(trial_id=trial_id)
        known = self._known(prefix)
        for name, content in files.items():
            identifier = known.get(name)
            if identifier is None:
                identifier = str(uuid.uuid4())
                self._files.write(identifier, io.BytesIO(content))
                self._register(prefix, identifier, name)
            elif self._content(identifier) != content:
                self._files.write(identifier, io.BytesIO(content))

    def trials_with_files(self) -> set[int]:
        """Optuna's numbers, in its database, of trials that have files."""
        keys = self._storage.get_study_system_attrs(self._study_id)
        return {int(found[1]) for found in map(_TRIAL_KEY.match, keys) if found}

    def _known(self, prefix: str) -> dict[str, str]:
        """Name -> identifier; the dashboard leaves null where an artifact was deleted."""
        found = {}
        for key, text in self._storage.get_study_system_attrs(self._study_id).items():
            if key.startswith(prefix) and _IDENTIFIER.fullmatch(key.removeprefix(prefix)):
                entry = json.loads(text)
                if entry:
                    found[entry["filename"]] = key.removeprefix(prefix)
        return found

    def _content(self, identifier: str) -> bytes | None:
        from optuna.artifacts.exceptions import ArtifactNotFound

        try:
            with self._files.open_reader(identifier) as file:
                return file.read()
        except ArtifactNotFound:
            return None

    def _register(self, prefix: str, identifier: str, name: str) -> None:
        kind, encoding = mimetypes.guess_type(name)
        entry = {
            "artifact_id": identifier,
            "filename": name,
            "mimetype": kind or "application/octet-stream",
            "encoding": encoding,
        }
        key = f"{prefix}{identifier}"
        self._storage.set_study_system_attr(self._study_id, key, json.dumps(entry))


def checked_folder(folder: Path) -> Path:
    """`folder`, made if it is not there.

    Raises:
        InputError: it cannot be made, or is a file.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"artifacts need a folder, and {folder} cannot be one ({error.strerror}); name another "
            "with --artifacts"
        ) from None
    return folder
