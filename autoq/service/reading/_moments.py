"""Refusals of what a study is not, or is no more, at the moment it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from autoq.api.study_tables import DISCOVERY, SENSITIVITY
from autoq.service.problems import Refusal
from autoq.service.reading._cached_tables import CachedStudy, tables_key
from autoq.service.replies import not_found
from autoq.studies import StudyMarks, WorkStatus


@contextmanager
def finished(study: CachedStudy, marks: StudyMarks) -> Iterator[None]:
    """Refuse what needs the scores of a study that has none yet; else as `unchanged`."""
    done = {name for _, name, status, _ in marks.stages if status == WorkStatus.DONE}
    for stage in (DISCOVERY, SENSITIVITY):
        if stage not in done:
            raise Refusal(
                "not-finished",
                f"study {study.name} has not finished its {stage}; wait for its search, or resume it",
            )
    with unchanged(study, marks):
        yield


@contextmanager
def unchanged(study: CachedStudy, marks: StudyMarks) -> Iterator[None]:
    """What fails because the study was deleted, or begun anew, while it was read is refused so."""
    try:
        yield
    except Refusal:
        raise
    except Exception as error:
        with not_found():
            now = study.store.study_marks(study.name)
        if tables_key(now) != tables_key(marks):
            raise Refusal(
                "conflict", f"study {study.name} was changed while it was read; ask again"
            ) from error
        raise
