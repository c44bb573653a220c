"""Optuna's trials, read from its tables without loading Optuna, which takes longer than any page.

Only what pages show is read, by the columns that Optuna's own migrations have kept since version 3;
where they are not as expected, there is an error and no guess.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Row, bindparam, inspect, text
from sqlalchemy.orm import Session

from autoq.errors import StoreError
from autoq.studies._base import Repository
from autoq.studies._encoding import iso_time

OWNER, _MADE_BY = "autoq_study", "autoq_made_by"  # user attributes of the Optuna study
TABLES = {"studies", "study_user_attributes", "trials", "trial_values", "trial_user_attributes"}

# Whose trials: of the refinements of one study, and not of the plans that are shown as trials.
_OF_STUDY = """
    FROM trials
    JOIN studies ON studies.study_id = trials.study_id
    JOIN study_user_attributes AS owner
      ON owner.study_id = trials.study_id AND owner.key = :owner_key AND owner.value_json = :owner
    WHERE NOT EXISTS (
      SELECT 1 FROM study_user_attributes AS made
      WHERE made.study_id = trials.study_id AND made.key = :made_by
    )
"""
_COUNT = text(f"SELECT count(*) {_OF_STUDY}")
_PAGE = text(
    "SELECT trials.trial_id, trials.number, studies.study_name, trials.state, "
    f"trials.datetime_start, trials.datetime_complete {_OF_STUDY}"
    "AND trials.trial_id > :after ORDER BY trials.trial_id LIMIT :limit"
)
_VALUES = text(
    "SELECT trial_id, value, value_type FROM trial_values WHERE trial_id IN :trials "
    "ORDER BY objective"
).bindparams(bindparam("trials", expanding=True))
_ATTRIBUTES = text(
    "SELECT trial_id, key, value_json FROM trial_user_attributes WHERE trial_id IN :trials "
    "AND key NOT IN :hidden ORDER BY trial_user_attribute_id"
).bindparams(bindparam("trials", expanding=True), bindparam("hidden", expanding=True))

_HIDDEN = ("plan", "losses", "worker", "sampler_state", "sealed")
"""User attributes that are long, say nothing to a reader, or are nobody's business outside the machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialRecord:
    """One trial of a refinement."""

    id: int  # of all Optuna studies of the store, rising
    number: int
    refinement: str  # the Optuna study
    state: str  # "complete", "fail", "running", "waiting" or "pruned"
    started: str | None
    finished: str | None
    values: tuple[float, ...]  # of each objective; finite ones
    attributes: dict[str, Any]  # without its plan and its losses, sequence by sequence


class TrialPageRepository(Repository):
    """The trials of refinements."""

    def trial_page(
        self, study_name: str, *, limit: int, after: int = 0
    ) -> tuple[list[TrialRecord], int]:
        """(trials of the study's refinements, the oldest first; how many there are in all).

        Args:
            limit: trials of the page.
            after: id of the last trial of the page before.
        """
        owner = {"owner_key": OWNER, "owner": json.dumps(study_name), "made_by": _MADE_BY}
        with self._database.read() as session:
            if not set(inspect(session.connection()).get_table_names()) >= TABLES:
                return [], 0  # nothing was ever refined in this store
            total = session.execute(_COUNT, owner).scalar_one()
            rows = session.execute(_PAGE, {**owner, "after": after, "limit": limit}).all()
            found = [row.trial_id for row in rows]
            values = _values(session, found)
            attributes = _attributes(session, found)
        return [_record(row, values, attributes) for row in rows], total


def _values(session: Session, trials: Sequence[int]) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row in session.execute(_VALUES, {"trials": trials}) if trials else ():
        if row.value_type == "FINITE" and row.value is not None and math.isfinite(row.value):
            found.setdefault(row.trial_id, []).append(row.value)
    return found


def _attributes(session: Session, trials: Sequence[int]) -> dict[int, dict[str, Any]]:
    found: dict[int, dict[str, Any]] = {}
    parameters = {"trials": trials, "hidden": _HIDDEN}
    for row in session.execute(_ATTRIBUTES, parameters) if trials else ():
        found.setdefault(row.trial_id, {})[row.key] = _plain(row)
    return found


def _plain(row: Row[Any]) -> Any:
    try:
        return json.loads(row.value_json)
    except ValueError as error:
        raise StoreError(
            f"attribute {row.key!r} of a trial is damaged: {error}; `autoq store check` names what "
            "else is, so restore the store from a copy"
        ) from error


def _record(
    row: Row[Any], values: dict[int, list[float]], attributes: dict[int, dict[str, Any]]
) -> TrialRecord:
    return TrialRecord(
        id=row.trial_id,
        number=row.number,
        refinement=row.study_name,
        state=row.state.lower(),
        started=_time(row.datetime_start),
        finished=_time(row.datetime_complete),
        values=tuple(values.get(row.trial_id, ())),
        attributes=attributes.get(row.trial_id, {}),
    )


def _time(written: str | datetime | None) -> str | None:
    """Optuna writes the time of the machine's own zone, without saying so."""
    if written is None:
        return None
    moment = datetime.fromisoformat(written) if isinstance(written, str) else written
    return iso_time(moment.astimezone())
