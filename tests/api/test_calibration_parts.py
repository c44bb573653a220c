"""A search within a bound on memory that is killed while it calibrates goes on at the block it was at."""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from autoq.api import reuse, search
from autoq.api.study_tables import CALIBRATION
from autoq.export import block_calibration
from autoq.export.block_calibration import BlockCalibration
from autoq.models.block_stream import BlockStream
from autoq.progress import SilentProgress
from autoq.studies import StudyStore, maintenance
from autoq.testing import tiny_models
from autoq.testing.tiny_models import write_family_model

BLOCKS = 4
SETTINGS: dict[str, Any] = {
    "effective_bits": 7.0,
    "formats": ("fp8", "nvfp4"),
    "calibration_sequences": 4,
    "sequence_length": 16,
    "batch_size": 2,
    "measure": False,
    "container": "modelopt",
}
_FOREIGN = "is of another version, processor, number of threads or choice of formats"


class Notes(SilentProgress):
    """Keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def note(self, text: str) -> None:
        """See `Progress.note`."""
        self.said.append(text)

    def about(self, words: str) -> list[str]:
        """The notes with those words."""
        return [text for text in self.said if words in text]


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))


@pytest.fixture
def calibrated(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The blocks that were calibrated, as it goes on."""
    blocks: list[str] = []
    calibrate = block_calibration.calibrate

    def noted(model: Any, model_map: Any, *rest: Any, **more: Any) -> Any:
        blocks.extend(model_map.blocks)
        return calibrate(model, model_map, *rest, **more)

    monkeypatch.setattr(block_calibration, "calibrate", noted)
    return blocks


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes a model of four blocks."""

    def written(family: str) -> Path:
        name, config, settings = tiny_models.FAMILY_SETTINGS[family]
        deeper = {**settings, "n_layer" if family == "gpt2" else "num_hidden_layers": BLOCKS}
        monkeypatch.setattr(tiny_models, "FAMILY_SETTINGS", {family: (name, config, deeper)})
        return write_family_model(family, tmp_path / "model")

    return written


def streamed(source: Path, store: Path, **settings: Any) -> tuple[Any, Notes]:
    notes = Notes()
    url = f"sqlite:///{store}"
    asked = {**SETTINGS, "max_memory": "1GB", **settings}
    return search(source, store=url, progress=notes, **asked), notes


def killed(source: Path, store: Path, *, after: int, **settings: Any) -> None:
    """A search that ends without a word after so many blocks; what it has stored stays."""
    kept = block_calibration.calibrate
    count = 0

    def calibrate(*rest: Any, **more: Any) -> Any:
        nonlocal count
        if count == after:
            raise KeyboardInterrupt
        count += 1
        return kept(*rest, **more)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(block_calibration, "calibrate", calibrate)
        patch.setattr(BlockStream, "check", _interrupt)  # comes when all are calibrated
        streamed(source, store, **settings)
    assert count == after


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def content(store: Path) -> dict[str, Any]:
    """What the store has of its only study, less times and what depends on when it ran."""
    queries = {
        "arrays": "SELECT stage, name, dtype, shape, sha256 FROM stored_array ORDER BY stage, name",
        "blobs": "SELECT sha256, size_bytes FROM blob ORDER BY sha256",
        "pieces": "SELECT count(*) FROM blob_chunk",
        "calibration": "SELECT payload, status FROM stage WHERE name IN ('calibration', 'sizes')",
        "batches": "SELECT batch_index, sha256 FROM score_batch ORDER BY batch_index",
        "plans": "SELECT label, assignment FROM plan ORDER BY label",
    }
    connection = sqlite3.connect(store)
    try:
        return {name: connection.execute(query).fetchall() for name, query in queries.items()}
    finally:
        connection.close()


def change(store: Path, statement: str, *values: Any) -> None:
    connection = sqlite3.connect(store)
    with connection:
        assert connection.execute(statement, values).rowcount == 1
    connection.close()


def assert_sound(store: Path) -> None:
    """As `autoq store check` has it."""
    assert maintenance.check(f"sqlite:///{store}") == []


_SMOOTHED = {"formats": ("int8_sq", "nvfp4"), "container": "compressed-tensors"}
_CASES = [
    ("llama", {"calibration": "max"}, (1,)),
    ("llama", {"calibration": "awq", "formats": ("w4a8_awq", "nvfp4"), "effective_bits": 5}, (2,)),
    pytest.param("llama", _SMOOTHED, (3,), marks=pytest.mark.slow),
    ("gpt2", {"calibration": "best", "formats": ("nvfp4",)}, (1, BLOCKS)),
    ("mixtral", {"calibration": "awq+gptq"}, (2,)),
]


@pytest.mark.parametrize(("family", "settings", "kills"), _CASES)
def test_a_killed_search_goes_on_at_its_block(
    family: str,
    settings: dict[str, Any],
    kills: tuple[int, ...],
    source: Callable[[str], Path],
    calibrated: list[str],
    tmp_path: Path,
) -> None:
    model = source(family)
    streamed(model, tmp_path / "whole.db", **settings)
    expected, paths = content(tmp_path / "whole.db"), list(calibrated)
    assert len(paths) == BLOCKS
    assert not [row for row in expected["arrays"] if row[1].startswith("part|")]

    for after in kills:
        store = tmp_path / f"{after}.db"
        killed(model, store, after=after, **settings)
        calibrated.clear()
        _, notes = streamed(model, store, **settings)

        assert calibrated == paths[after:]
        where = f"at block {after + 1}" if after < BLOCKS else f"behind block {BLOCKS}"
        assert len(notes.about(f"calibration taken up {where} of {BLOCKS}")) == 1
        found = content(store)
        for name in expected:
            assert found[name] == expected[name], (after, name)
        assert_sound(store)


@pytest.mark.parametrize(
    ("left_out", "after", "where"),
    [
        ((0,), 1, "at block 3"),
        ((1,), 1, "at block 3"),
        ((3,), 3, "behind block 4"),
        ((2, 3), 1, "at block 2"),
    ],
)
def test_blocks_that_are_left_out_count_as_done(
    left_out: tuple[int, ...],
    after: int,
    where: str,
    source: Callable[[str], Path],
    calibrated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = source("llama")
    settings = {"exclude": tuple(f"model.layers.{block}.*" for block in left_out)}
    streamed(model, tmp_path / "whole.db", **settings)
    paths, store = list(calibrated), tmp_path / "killed.db"
    assert len(paths) == BLOCKS - len(left_out)
    killed(model, store, after=after, **settings)
    calibrated.clear()
    run: list[int] = []
    keep_outputs = BlockCalibration._keep_outputs

    def noted(self: Any, stream: Any, number: int, *rest: Any) -> None:
        run.append(number)
        keep_outputs(self, stream, number, *rest)

    monkeypatch.setattr(BlockCalibration, "_keep_outputs", noted)
    _, notes = streamed(model, store, **settings)

    assert calibrated == paths[after:]
    assert len(notes.about(f"calibration taken up {where} of {BLOCKS}")) == 1, notes.said
    # Outputs serve the blocks behind, where any of them is still to be calibrated.
    last = max((int(path.rsplit(".", 1)[1]) for path in calibrated), default=0)
    assert run == [block for block in range(last) if f"model.layers.{block}" not in calibrated]
    assert content(store) == content(tmp_path / "whole.db")


def _array_of(block: int) -> str:
    return f"SELECT id FROM stored_array WHERE name LIKE 'codes|%layers.{block}.mlp.down_proj%'"


def _blob_changed(row: str) -> str:
    return f"""UPDATE blob_chunk SET data = CAST(data || x'00' AS BLOB) WHERE blob_id = (SELECT b.id
        FROM blob b JOIN stored_array a ON a.sha256 = b.sha256 WHERE a.id = ({row}))"""


_DAMAGE = {
    "bytes": (
        _blob_changed(_array_of(0)),
        _blob_changed("SELECT id FROM stored_array WHERE name = 'part|1'"),
    ),
    "rows": (
        f"UPDATE stored_array SET dtype = '<f8' WHERE id = ({_array_of(0)})",
        f"DELETE FROM stored_array WHERE id = ({_array_of(1)})",
    ),
}
"""What spoils the first two blocks."""


def test_what_is_spoilt_is_computed_anew(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    model = source("llama")
    streamed(model, tmp_path / "whole.db")
    expected = content(tmp_path / "whole.db")

    for name, statements in _DAMAGE.items():
        store = tmp_path / f"{name}.db"
        killed(model, store, after=3)
        for statement in statements:
            change(store, statement)
        calibrated.clear()
        _, notes = streamed(model, store)

        assert calibrated == [f"model.layers.{block}" for block in (0, 1, 3)], name
        for block in (0, 1):
            words = f"the calibration of model.layers.{block} is computed anew: "
            assert len(notes.about(words)) == 1, notes.said
        assert notes.about("taken up at block 1 of 4; 1 behind it are calibrated"), notes.said
        found = content(store)
        for part in expected:
            assert found[part] == expected[part], (name, part)
        assert_sound(store)


def test_what_another_version_has_left_is_not_taken(
    source: Callable[[str], Path],
    calibrated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = source("llama")
    streamed(model, tmp_path / "whole.db")
    store = tmp_path / "killed.db"
    killed(model, store, after=2)
    monkeypatch.setattr(reuse, "code_version", lambda _packages: "of tomorrow")
    calibrated.clear()

    _, notes = streamed(model, store)

    assert len(calibrated) == BLOCKS
    assert len(notes.about(_FOREIGN)) == 1
    assert notes.about("taken up") == []
    assert content(store) == content(tmp_path / "whole.db")


@pytest.mark.parametrize("package", ["api.streamed", "export"])
def test_what_other_code_that_streams_has_left_is_not_taken(
    package: str,
    source: Callable[[str], Path],
    calibrated: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, store = source("llama"), tmp_path / "killed.db"
    killed(model, store, after=1)
    kept = reuse.code_version
    monkeypatch.setattr(reuse, "code_version", lambda names: kept(names) + "!" * (package in names))
    calibrated.clear()

    _, notes = streamed(model, store)

    assert len(calibrated) == BLOCKS
    assert len(notes.about(_FOREIGN)) == 1


def test_what_another_number_of_threads_has_left_is_not_taken(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    model, store = source("llama"), tmp_path / "killed.db"
    own = torch.get_num_threads()
    killed(model, store, after=1)
    calibrated.clear()
    torch.set_num_threads(own + 1)
    try:
        _, notes = streamed(model, store)
    finally:
        torch.set_num_threads(own)

    assert len(calibrated) == BLOCKS
    assert len(notes.about(_FOREIGN)) == 1


def test_another_configuration_begins_its_own(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    model = source("llama")
    store = tmp_path / "killed.db"
    killed(model, store, after=2)
    calibrated.clear()

    _, notes = streamed(model, store, calibration="max")

    assert len(calibrated) == BLOCKS
    assert notes.about("taken up") + notes.about(_FOREIGN) == []


@pytest.mark.slow
def test_what_another_study_has_by_then_changes_what_is_left(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    """A format's calibration is taken over as a whole; blocks of both formats are of no use then."""
    model = source("llama")
    store = tmp_path / "killed.db"
    killed(model, store, after=2)
    other, _ = streamed(model, store, formats=("fp8",), effective_bits=8.0)
    calibrated.clear()

    found, notes = streamed(model, store)

    assert len(calibrated) == BLOCKS
    assert len(notes.about(f"calibration of fp8 reused from study {other.name}")) == 1
    assert len(notes.about(_FOREIGN)) == 1
    whole, _ = streamed(model, tmp_path / "whole.db")
    assert found.sensitivity.contributions.tobytes() == whole.sensitivity.contributions.tobytes()
    assert_sound(store)


def test_in_memory_nothing_is_taken_up_and_nothing_left(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    model = source("llama")
    streamed(model, tmp_path / "whole.db")
    store = tmp_path / "killed.db"
    killed(model, store, after=2)
    calibrated.clear()

    _, notes = streamed(model, store, max_memory=None)

    assert calibrated == []  # not block by block
    assert notes.about("taken up") + notes.about(_FOREIGN) == []
    assert content(store) == content(tmp_path / "whole.db")


def test_an_array_that_another_search_has_replaced_is_not_taken(
    source: Callable[[str], Path], calibrated: list[str], tmp_path: Path
) -> None:
    """It is sound by itself, and of its name; beside the part's records it would be a mixture."""
    model = source("llama")
    streamed(model, tmp_path / "whole.db")
    store = tmp_path / "killed.db"
    killed(model, store, after=3)
    connection = sqlite3.connect(store)
    (name,) = connection.execute(_array_of(1).replace("id", "name", 1)).fetchone()
    connection.close()
    with StudyStore.open(f"sqlite:///{store}") as opened:
        (study,) = opened.list_studies()
        array = opened.get_array(study.id, CALIBRATION, name)
        opened.put_array(study.id, CALIBRATION, name, array ^ 1)
    calibrated.clear()

    _, notes = streamed(model, store)

    assert calibrated == [f"model.layers.{block}" for block in (1, 3)]
    words = f"layers.1 is computed anew: array {name!r} was replaced"
    assert len(notes.about(words)) == 1, notes.said
    assert content(store) == content(tmp_path / "whole.db")
    assert_sound(store)
