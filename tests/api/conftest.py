"""A tiny model folder and arguments that make a whole search take about a second."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from autoq.testing.tiny_models import write_tiny_model
from tests.api.refinements import QUICK


@pytest.fixture(scope="session")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


@pytest.fixture
def quick(tmp_path: Path) -> dict[str, Any]:
    """Keyword arguments of a search that is small and has its own store."""
    return {
        "formats": ("fp8", "nvfp4"),
        "effective_bits": 6.0,
        "calibration_sequences": 6,
        "sequence_length": 32,
        "batch_size": 2,
        "held_out_sequences": 2,
        "store": f"sqlite:///{tmp_path / 'studies.db'}",
    }


@pytest.fixture(scope="session")
def measured_store(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one study, its plan of 6 bits and five others measured; copy it to change it."""
    import autoq

    path = tmp_path_factory.mktemp("measured") / "studies.db"
    study = autoq.search(
        llama_folder,
        formats=("fp8", "nvfp4"),
        effective_bits=6.0,
        calibration_sequences=6,
        sequence_length=32,
        batch_size=2,
        held_out_sequences=2,
        store=f"sqlite:///{path}",
    )
    study.validate(random=3, near=3, sequences=2)
    study.store.close()
    return path


@pytest.fixture(scope="session")
def searched(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one study and its plan of 6 bits; copy it to change it."""
    import autoq

    path = tmp_path_factory.mktemp("searched") / "studies.db"
    autoq.search(llama_folder, **QUICK, store=f"sqlite:///{path}").store.close()
    return path


@pytest.fixture
def copy_of(searched: Path, tmp_path: Path) -> Any:
    """Makes a store of the test's own with that study, and opens it."""
    from autoq.api import open_study

    def copy(name: str) -> Any:
        shutil.copyfile(searched, tmp_path / name)
        return open_study(None, f"sqlite:///{tmp_path / name}")

    return copy


@pytest.fixture
def study(copy_of: Any) -> Any:
    """A study that was searched and not refined, in a store of the test's own."""
    return copy_of("studies.db")
