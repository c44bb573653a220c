"""A process that is killed after its checkpoint has its name, and before the store knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import autoq
from autoq.errors import ExportError
from autoq.studies import ExportStatus, StudyStore
from tests.api.distribution.studies import Notes
from tests.api.refinements import QUICK


class KilledError(BaseException):
    """What stands for the kill: nothing of autoq's own catches it."""


@pytest.fixture
def asked(llama_folder: Path, tmp_path: Path) -> dict[str, Any]:
    store = f"sqlite:///{tmp_path / 'studies.db'}"
    return {"model": llama_folder, **QUICK, "store": store, "export": tmp_path / "out"}


@pytest.fixture
def killed(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a search that was killed between the two."""

    def die(*_: Any, **__: Any) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(StudyStore, "finish_export", die)
        with pytest.raises(KilledError):
            autoq.search(**asked)
    folder: Path = asked["export"]
    assert (folder / "config.json").is_file()
    return folder


def test_its_folder_is_recognised_and_recorded(killed: Path, asked: dict[str, Any]) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(killed.iterdir())}
    notes = Notes()
    study = autoq.search(**asked, progress=notes)
    assert {path: path.stat().st_mtime_ns for path in sorted(killed.iterdir())} == before
    assert any("killed before it was recorded" in text for text in notes.texts)
    (export,) = study.store.exports(study.id)
    assert export.status is ExportStatus.COMPLETE
    assert {file.path for file in export.files} == {path.name for path in before}
    assert export.bytes_written == sum(path.stat().st_size for path in before)
    assert export.verification["container"] == "modelopt"
    stages = {stage.name: stage.status.value for stage in study.store.stages(study.id)}
    assert stages["export"] == "done"
    with pytest.raises(ExportError, match="must be new"):  # from now on it is one that is there
        autoq.search(**asked)


@pytest.mark.parametrize("change", ["byte", "more", "less"])
def test_another_folder_is_not_taken_for_it(
    change: str, killed: Path, asked: dict[str, Any]
) -> None:
    weights = next(killed.glob("*.safetensors"))
    if change == "byte":
        data = bytearray(weights.read_bytes())
        data[-1] ^= 1
        weights.write_bytes(data)
    elif change == "more":
        (killed / "notes.txt").write_text("mine")
    else:
        weights.unlink()
    with pytest.raises(ExportError, match="must be new"):
        autoq.search(**asked)
    study = autoq.search(**asked, overwrite=True)
    assert study.store.exports(study.id)[-1].status is ExportStatus.COMPLETE
    assert not (killed / "notes.txt").exists()
