"""Studies whose tables stay in memory, so that a plan for another budget takes milliseconds.

What is kept belongs to one state of the study's tables: whenever a stage that they come from is begun
or ends, the study is read anew. Plans, measurements and exports are read from the store each time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from typing import Generic, TypeVar

from autoq.api.budgets import Budgets
from autoq.api.costing import SIZES, refuse_uncounted
from autoq.api.study_tables import CALIBRATION, DISCOVERY, NO_BUDGETS, SENSITIVITY, StudyTables
from autoq.search import Plan, Planner
from autoq.search.costs import StoredSizes
from autoq.studies import StudyMarks, StudyRecord, StudyStore

_STAGES = frozenset({DISCOVERY, CALIBRATION, SENSITIVITY, SIZES})
"""Those that the tables come from."""

_PLANNERS = 8
_FRONTIERS = 4

T = TypeVar("T")


class Bounded(Generic[T]):
    """The values that were used last, each made once, however many threads ask for it."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._values: OrderedDict[Hashable, T] = OrderedDict()
        self._making: dict[Hashable, threading.Lock] = {}
        self._lock = threading.Lock()
        self._hits = self._misses = 0

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value of the key; what `make` raises is raised, and nothing is kept then."""
        with self._lock:
            found = self._found(key)
            if found is not None:
                self._hits += 1
                return found
            self._misses += 1
            making = self._making.setdefault(key, threading.Lock())
        with making:
            with self._lock:
                found = self._found(key)
            if found is not None:
                return found
            try:
                made = make()
                with self._lock:
                    self._values[key] = made
                    while len(self._values) > self._most:
                        self._values.popitem(last=False)
            finally:
                with self._lock:
                    self._making.pop(key, None)
        return made

    def counts(self) -> dict[str, int]:
        """How often a value was at hand, and how often it was made or waited for."""
        with self._lock:
            return {"hit": self._hits, "miss": self._misses}

    def drop(self, unwanted: Callable[[Hashable], bool]) -> None:
        """Forget the keys that the function says yes to."""
        with self._lock:
            for key in [key for key in self._values if unwanted(key)]:
                del self._values[key]

    def __len__(self) -> int:
        with self._lock:
            return len(self._values)

    def _found(self, key: Hashable) -> T | None:
        found = self._values.get(key)
        if found is not None:
            self._values.move_to_end(key)
        return found


class CachedStudy(StudyTables):
    """A study that keeps what it solves with."""

    def __init__(self, store: StudyStore, record: StudyRecord) -> None:
        super().__init__(store, record)
        self._planners: Bounded[Planner] = Bounded(_PLANNERS)
        self._frontiers: Bounded[list[Plan]] = Bounded(_FRONTIERS)

    @property
    def stored_sizes(self) -> StoredSizes | None:
        """As for every study, but read once: every plan asks for it."""
        return self._sizes

    @cached_property
    def _sizes(self) -> StoredSizes | None:
        return super().stored_sizes

    def planner(self, rules: Sequence[str] = (), budgets: Budgets = NO_BUDGETS) -> Planner:
        """As for every study, but made once for rules and hardware."""
        hardware = Budgets(gpu=budgets.gpu, latency_tokens=budgets.latency_tokens)
        key = (tuple(rules), hardware.gpu, hardware.latency_tokens)
        make = super().planner
        planner = self._planners.get(key, lambda: make(rules, hardware))
        needed = [budget.resource for budget in budgets.limits]
        refuse_uncounted(self.name, planner.costs, needed)
        return planner

    def frontier(self, points: int = 64, *, max_gb: float | None = None) -> list[Plan]:
        """As for every study, but found once for points and rules."""
        if max_gb is not None:
            return super().frontier(points, max_gb=max_gb)
        make = super().frontier
        return self._frontiers.get((points, self.rules), lambda: make(points))


class StudyCache:
    """The studies that were read last."""

    def __init__(self, store: StudyStore, *, most: int) -> None:
        """
        Args:
            most: studies kept; one of 1,000 groups and 12 formats takes some megabytes.
        """
        self._store = store
        self._studies: Bounded[CachedStudy] = Bounded(most)

    def __len__(self) -> int:
        return len(self._studies)

    def counts(self) -> dict[str, int]:
        """See `Bounded.counts`."""
        return self._studies.counts()

    def study(self, name: str) -> tuple[CachedStudy, StudyMarks]:
        """The study as it is now.

        Raises:
            UnknownNameError: there is none of this name.
        """
        marks = self._store.study_marks(name)
        key = tables_key(marks)
        study = self._studies.get(key, lambda: self._read(marks, key))
        return study, marks

    def _read(self, marks: StudyMarks, key: Hashable) -> CachedStudy:
        self._studies.drop(lambda other: _is_of(other, marks.study_id) and other != key)
        return CachedStudy(self._store, self._store.study(marks.study_id))


def tables_key(marks: StudyMarks) -> tuple[Hashable, ...]:
    """What tells one state of a study's tables from another."""
    of_tables = tuple(stage for stage in marks.stages if stage[1] in _STAGES)
    return (marks.study_id, marks.key, marks.created, of_tables)


def _is_of(key: Hashable, study_id: int) -> bool:
    return isinstance(key, tuple) and key[0] == study_id
