"""What tests of distribution share: a search of eight batches, and what makes two studies equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from autoq.api.study_tables import SENSITIVITY
from autoq.progress import SilentProgress

EIGHT_BATCHES = {
    "formats": ("fp8", "nvfp4"),
    "effective_bits": 6.0,
    "calibration_sequences": 8,
    "sequence_length": 32,
    "batch_size": 1,
    "draws": 2,
    "calibration": "max",
    "measure": False,
}


class Notes(SilentProgress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def note(self, text: str) -> None:
        self.texts.append(text)


def search_in(folder: Path, store: Path) -> dict[str, Any]:
    """Arguments of a search with its own store."""
    return {"model": folder, **EIGHT_BATCHES, "store": f"sqlite:///{store}"}


def assert_same(found: Any, expected: Any) -> None:
    """The scores of two studies, and their cross terms, are equal bit for bit."""
    batches = [study.store.score_batches(study.id) for study in (found, expected)]
    assert list(batches[0]) == list(batches[1])
    for index, scores in batches[0].items():
        assert scores.tobytes() == batches[1][index].tobytes()
    assert found.interactions.gram.tobytes() == expected.interactions.gram.tobytes()
    assert found.sensitivity.contributions.tobytes() == expected.sensitivity.contributions.tobytes()


def workers_of(study: Any) -> dict[str, int]:
    """Who scored how many batches."""
    entries = study.store.stage(study.id, SENSITIVITY).payload["workers"]
    return {entry["name"]: entry["batches"] for entry in entries}
