"""A search within a bound on memory: the same study as with the model in memory, bit for bit."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.api import open_study, search
from autoq.api.config import ScoringConfig
from autoq.api.sizes import parse_bytes
from autoq.api.streamed.streaming import fresh_folder, load_streamed
from autoq.api.study_tables import CALIBRATION, SENSITIVITY
from autoq.errors import InputError, ModelError
from autoq.kernels._torch.compiled import POLICY_VARIABLE, Policy, policy
from autoq.models import discover, load_model
from autoq.models.block_stream import StreamedModel
from autoq.models.kept_tensors import KeptTensors
from autoq.progress import Advance, SilentProgress
from autoq.testing.tiny_models import make_tiny_model, write_family_model

SETTINGS: dict[str, Any] = {
    "effective_bits": 6.5,
    "formats": ("fp8", "nvfp4"),
    "calibration_sequences": 6,
    "sequence_length": 16,
    "batch_size": 2,
    "held_out_sequences": 3,
    "container": "modelopt",
}


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def searched(source: Path, store: Path, **settings: Any) -> Any:
    return search(source, store=f"sqlite:///{store}", **{**SETTINGS, **settings})


def streamed(source: Path, store: Path, **settings: Any) -> Any:
    return searched(source, store, **{"max_memory": "1GB", **settings})


def stored(study: Any) -> dict[str, Any]:
    """Everything that a study found, less times and names."""
    arrays = {
        f"{stage}/{name}": (array.dtype.str, array.shape, array.tobytes())
        for stage in (CALIBRATION, SENSITIVITY)
        for name, array in study.store.arrays(study.id, stage).items()
    }
    measured = [
        (record.metric, record.label, record.value, record.interval, record.details)
        for record in study.store.measurements(study.id)
    ]
    return {
        "key": study.record.key,
        "arrays": arrays,
        "calibration": study.store.stage(study.id, CALIBRATION).payload,
        "sizes": study.store.stage(study.id, "sizes").payload,
        "scores": study.sensitivity.contributions.tobytes(),
        "plans": [(plan.label, plan.assignment) for plan in study.plans()],
        "measured": measured,
    }


def files_of(folder: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.glob("*.safetensors")
    }


@pytest.mark.parametrize(
    ("family", "calibration"), [("llama", "best"), ("gpt2", "scales"), ("mixtral", "max")]
)
def test_the_study_is_that_of_the_model_in_memory(
    family: str, calibration: str, tmp_path: Path, own_temporary_folder: Path
) -> None:
    source = write_family_model(family, tmp_path / "model")

    whole = searched(source, tmp_path / "a.db", calibration=calibration, export=tmp_path / "whole")
    found = streamed(
        source, tmp_path / "b.db", calibration=calibration, export=tmp_path / "streamed"
    )

    mine, expected = stored(found), stored(whole)
    for name in expected:
        assert mine[name] == expected[name], name
    assert len(expected["measured"]) >= 4
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole") != {}
    assert all(parameter.is_meta for parameter in found.loaded().model.parameters())
    assert list(own_temporary_folder.glob("autoq-*")) == []


def test_a_killed_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_temporary_folder: Path
) -> None:
    source = write_family_model("llama", tmp_path / "model")
    whole = searched(source, tmp_path / "a.db", calibration="max")
    from autoq.api.streamed import streaming

    monkeypatch.setattr(streaming, "_MOST_TOGETHER", 2)
    reads = _killed_after(monkeypatch, blocks=2 * 3 + 2 * 2 + 1)  # in the second two batches
    modes: list[int] = []
    monkeypatch.setattr(streaming, "KeptTensors", lambda folder, *rest: _seen(modes, folder, *rest))
    with pytest.raises(KeyboardInterrupt):
        streamed(source, tmp_path / "b.db", calibration="max")
    assert modes == [0o700]  # what blocks give follows from the calibration text
    left = open_study(None, f"sqlite:///{tmp_path / 'b.db'}")
    assert len(left.store.score_batches(left.id)) == 2
    reads.undo()

    found = streamed(source, tmp_path / "b.db", calibration="max")

    assert stored(found) == stored(whole)
    assert list(own_temporary_folder.glob("autoq-*")) == []


def _seen(modes: list[int], folder: Path, *rest: Any) -> KeptTensors:
    modes.append(folder.stat().st_mode & 0o777)
    return KeptTensors(folder, *rest)


def _killed_after(monkeypatch: pytest.MonkeyPatch, *, blocks: int) -> pytest.MonkeyPatch:
    """The process ends when a block more is read."""
    patch = pytest.MonkeyPatch()
    read, count = StreamedModel.block, [0]

    def block(self: StreamedModel, number: int) -> Any:
        count[0] += 1
        if count[0] > blocks:
            raise KeyboardInterrupt
        return read(self, number)

    patch.setattr(StreamedModel, "block", block)
    return patch


def test_a_search_in_memory_goes_on_within_a_bound(tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    store = tmp_path / "a.db"
    whole = searched(source, store, calibration="max", measure=False)

    found = streamed(source, store, calibration="max", effective_bits=7.0)

    assert found.name == whole.name
    assert found.sensitivity.contributions.tobytes() == whole.sensitivity.contributions.tobytes()
    assert found.plan().to_plan().effective_bits <= 7.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_memory": "0.3GB"}, r"must hold a block.*bound is 0\.3GB; give --max-memory 0\.7GB"),
        ({"max_memory": "four"}, r"a number and MB, MiB, GB or GiB, got 'four'"),
        ({"max_memory": "0"}, r"must be above 0, got '0'"),
        ({"devices": 2}, r"what --devices, --ray and torchrun asks"),
        ({"refine": 3}, r"what --refine asks.*leave --refine or --max-memory out"),
        ({"kv_formats": ("fp8",)}, r"what --kv-formats asks"),
        ({"effective_bits": None, "max_kl": 0.1}, r"what --max-kl with measuring asks"),
        ({"estimator": "factored"}, r"factored needs the whole model"),
        ({"estimator": "sequence_projection"}, r"draws them 4 times; give --draws 1"),
        ({"include": ("lm_head",)}, r"must lie in one of the model's blocks, and lm_head does not"),
    ],
)
def test_what_cannot_be_had_is_refused(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = write_family_model("llama", tmp_path / "model")

    with pytest.raises(InputError, match=message):
        streamed(source, tmp_path / "a.db", **settings)
    assert not (tmp_path / "a.db").exists()


def test_a_model_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"reads a model folder, and the model was given in memory"
    ):
        search(make_tiny_model("llama"), max_memory="1GB", store=f"sqlite:///{tmp_path / 'a.db'}")


def test_broken_weights_are_named(tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    file = source / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.input_layernorm.weight"][3] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=r"layers\.1\.input_layernorm\.weight has 1 NaN or inf"):
        streamed(source, tmp_path / "a.db")


def test_processes_with_stores_in_memory_do_not_share_a_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_family_model("llama", tmp_path / "model")
    study = search(source, store="sqlite://", **{**SETTINGS, "calibration": "max"}, measure=False)
    first = fresh_folder(study, CALIBRATION)

    monkeypatch.setattr("os.getpid", lambda: -1)
    second = fresh_folder(study, CALIBRATION)

    assert first != second
    assert first.is_dir()


@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
def test_missing_weights_are_named_before_anything_runs(name: str, tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    file = source / "model.safetensors"
    tensors = load_file(file)
    del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})

    with pytest.raises(ModelError, match=rf"model lacks {name}; fetch the model again"):
        streamed(source, tmp_path / "a.db")
    assert not (tmp_path / "a.db").exists()


def test_blocks_have_the_weights_that_are_not_searched_as_well(tmp_path: Path) -> None:
    source = write_family_model("mixtral", tmp_path / "model")
    loaded = load_streamed(ScoringConfig(), source, 10**9)
    assert loaded.stream is not None
    model_map = discover(loaded.model, exclude=("*experts*",))
    expected = dict(load_model(source, dtype=torch.float32).named_parameters())

    streamed_model = loaded.stream.model(loaded, model_map)

    for number, path in enumerate(model_map.blocks):
        with streamed_model.block(number) as block:
            for name, found in block.named_parameters():
                assert torch.equal(found, expected[f"{path}.{name}"]), name


def test_what_needs_the_whole_model_says_so_afterwards(tmp_path: Path) -> None:
    source = write_family_model("llama", tmp_path / "model")
    study = streamed(source, tmp_path / "a.db", calibration="max", measure=False)

    with pytest.raises(InputError, match=r"searched within a bound on memory.*open the study anew"):
        study.simulate(study.plan())
    again = open_study(study.name, study.store.url)
    assert type(again.simulate(again.plan()).model) is type(load_model(source))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("4GB", 4 * 10**9), ("1.5 GiB", 3 << 29), ("900mb", 9 * 10**8), (77, 77), ("2KiB", 2048)],
)
def test_sizes_are_read(text: str | int, expected: int) -> None:
    assert parse_bytes(text) == expected


class WatchingPolicy(SilentProgress):
    """Records what may be compiled whenever work begins."""

    def __init__(self) -> None:
        self.seen: list[Policy] = []

    @contextmanager
    def task(self, description: str, total: int) -> Iterator[Advance]:
        self.seen.append(policy())
        yield lambda steps=1: None


def test_nothing_is_compiled_where_memory_is_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(POLICY_VARIABLE, raising=False)
    source = write_family_model("llama", tmp_path / "model")
    bounded, free = WatchingPolicy(), WatchingPolicy()
    streamed(source, tmp_path / "bounded.db", progress=bounded)
    searched(source, tmp_path / "free.db", progress=free)
    assert set(bounded.seen) == {Policy.NEVER}
    assert set(free.seen) == {Policy.AUTO}
