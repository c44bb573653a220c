"""Finding studies in a store."""

from __future__ import annotations

from typing import Any

from autoq.api.study import Study
from autoq.errors import UnknownNameError
from autoq.studies import StudyStore
from autoq.studies.listing import list_entries

DEFAULT_STORE = "sqlite:///autoq.db"


def open_study(
    name: str | None = None,
    store: str | StudyStore = DEFAULT_STORE,
    *,
    trust_remote_code: bool = False,
) -> Study:
    """A study by name, number or unique beginning of its name; None is the newest.

    Args:
        trust_remote_code: run Python code that the model's folder brings, when the model has to be
            loaded; what the store says of it does not count.
    Raises:
        UnknownNameError: there is no such study; the message lists near misses.
    """
    opened = StudyStore.open(store) if isinstance(store, str) else store
    if name is None:
        studies = opened.list_studies()
        if not studies:
            raise UnknownNameError(
                "the store has no study yet; make one with `autoq search MODEL --bits B`"
            )
        name = max(studies, key=lambda study: study.updated).name
    return Study(opened, opened.find(name), trust_remote_code=trust_remote_code)


def list_studies(store: str | StudyStore = DEFAULT_STORE) -> list[dict[str, Any]]:
    """One entry per study: name, model, status, times, budgets that were asked for, exports.

    The status is "interrupted" where the process that worked on the study ended before its work.
    "budgets" are those in effective bits, "other_budgets" those in other units, as text.
    """
    opened = StudyStore.open(store) if isinstance(store, str) else store
    return list_entries(opened)
