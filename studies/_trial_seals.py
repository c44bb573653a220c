"""What protects trials, whose tables are Optuna's: an attribute with a hash of what a trial found.

Trials of earlier versions have none and count as they are. Attributes of a whole refinement (its
noise floor, what was confirmed) have none either.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sqlalchemy import inspect, text
from sqlalchemy.orm import Session

from autoq.errors import StoreError
from autoq.studies._encoding import canonical_json, sha256_hex
from autoq.studies._trials import WORKER

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

SEALED = "sealed"
"""User attribute of a trial: {"attributes": names of those under the hash, "sha256": it}."""


def trial_seal(
    attributes: Mapping[str, Any], params: Mapping[str, float], values: Sequence[float] | None
) -> dict[str, Any]:
    """The attribute of a trial that is about to end.

    Args:
        attributes: all that it has; who measures it is left out.
        values: None where it ends early: what Optuna then says is no result.
    """
    names = sorted(name for name in attributes if name not in (WORKER, SEALED))
    return {"attributes": names, "sha256": _hash(names, attributes, params, values)}


def refuse_damaged_trial(entry: FrozenTrial) -> None:
    """
    Raises:
        StoreError: the trial has a result and a seal, and is not what it was made of.
    """
    from optuna.trial import TrialState

    if entry.state is TrialState.FAIL:
        return  # it has no result; what it has of a seal is of an attempt that was interrupted
    values = entry.values if entry.state is TrialState.COMPLETE else None
    if not _is_as_written(entry.user_attrs, entry.params, values):
        raise StoreError(
            f"trial {entry.number} is damaged: it does not match the SHA-256 stored with it; "
            "`autoq store check` names what else is, so restore the store from a copy"
        )


def damaged_trials(session: Session) -> Iterator[tuple[str, int]]:
    """(name of Optuna's study, number of the trial) of trials that are not as they were written.

    Of those with a result: one that is interrupted between its seal and its end has none, and is
    tried again.
    """
    if not inspect(session.connection()).has_table("trial_user_attributes"):
        return  # nothing was refined
    query = (
        "SELECT t.trial_id, t.number, t.state, s.study_name FROM trials t "
        "JOIN studies s ON s.study_id = t.study_id JOIN trial_user_attributes a "
        "ON a.trial_id = t.trial_id AND a.key = :sealed "
        "WHERE t.state NOT IN ('RUNNING', 'WAITING', 'FAIL') ORDER BY t.trial_id"
    )
    for trial_id, number, state, study in session.execute(text(query), {"sealed": SEALED}).all():
        try:
            intact = _is_stored_as_written(session, trial_id, str(state) == "COMPLETE")
        except ValueError:  # an attribute that is no JSON
            intact = False
        if not intact:
            yield study, number


def _is_stored_as_written(session: Session, trial_id: int, is_complete: bool) -> bool:
    def rows(query: str) -> list[Any]:
        return list(session.execute(text(f"{query} WHERE trial_id = :id"), {"id": trial_id}))

    attributes = rows("SELECT key, value_json FROM trial_user_attributes")
    params = rows("SELECT param_name, param_value FROM trial_params")
    values = sorted(rows("SELECT objective, value FROM trial_values"))
    return _is_as_written(
        {name: json.loads(value) for name, value in attributes},
        {name: value for name, value in params},  # noqa: C416  (rows are no pairs)
        [value for _, value in values] if is_complete else None,
    )


def _is_as_written(
    attributes: Mapping[str, Any], params: Mapping[str, float], values: Sequence[float] | None
) -> bool:
    seal = attributes.get(SEALED)
    if seal is None:
        return True
    try:
        return bool(seal["sha256"] == _hash(seal["attributes"], attributes, params, values))
    except (KeyError, TypeError, ValueError):
        return False  # an attribute is missing, or of another type


def _hash(
    names: Sequence[str],
    attributes: Mapping[str, Any],
    params: Mapping[str, float],
    values: Sequence[float] | None,
) -> str:
    content = [
        {name: attributes[name] for name in names},
        {name: float(value) + 0.0 for name, value in params.items()},
        None if values is None else [float(value) + 0.0 for value in values],
    ]
    return sha256_hex(canonical_json(content).encode())
