"""What a search will need: its terms by hand, what does not fit, and what would."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

import autoq
from autoq.api.preflight import Preflight, disk, estimating, preflight
from autoq.api.preflight import memory as memory_module
from autoq.api.streamed.memory_bound import MemoryNeeds
from autoq.api.study_tables import CALIBRATION
from autoq.bundled import model_path
from autoq.errors import DataError, InputError, ModelError
from autoq.models import load_model
from autoq.testing.tiny_models import write_family_model

SMALL = {
    "calibration_sequences": 4,
    "sequence_length": 32,
    "batch_size": 2,
    "held_out_sequences": 2,
}
GIB = 1 << 30


def estimate(model: Path, tmp_path: Path, **options: Any) -> Preflight:
    store = f"sqlite:///{tmp_path / 'studies.db'}"
    return preflight(model, **{**SMALL, "store": store, **options})


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Says how much memory is free."""

    monkeypatch.setattr(estimating, "_own_bytes", lambda: (300_000_000, 0))

    def leave(size: int) -> None:
        monkeypatch.setattr(estimating, "available_bytes", lambda _: size)

    return leave


def test_terms_are_those_of_the_shapes(llama_folder: Path, tmp_path: Path, room: Any) -> None:
    room(GIB)
    model = load_model(llama_folder)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    layers = list(model.model.layers)
    searched = sum(w.numel() for layer in layers for w in layer.parameters() if w.ndim == 2)

    found = estimate(llama_folder, tmp_path, formats=("fp8",), export=tmp_path / "out")

    # One byte for every searched weight, two for the others; file headers are the rest.
    stored = (llama_folder / "model.safetensors").stat().st_size
    rest = (parameters - searched) * stored / parameters
    assert found.checkpoint_bytes == pytest.approx(searched + rest, abs=2)
    # Everything is in float32 on a CPU, and measuring keeps what it replaces.
    base = found.used_memory_bytes
    measuring = found.memory_bytes["measuring"] - base
    assert measuring > 4 * (parameters + searched)
    without = estimate(llama_folder, tmp_path, formats=("fp8",), measure=False)
    assert set(without.memory_bytes) == {"loading", "calibrating", "scoring"}
    assert without.checkpoint_bytes == 0
    assert found.peak_bytes == max(found.memory_bytes.values())
    assert found.total_seconds == pytest.approx(sum(found.seconds.values()))
    assert found.seconds.keys() == found.memory_bytes.keys()
    assert min(found.seconds.values()) > 0.0


def test_moments_are_taken_in_parts_that_fit(llama_folder: Path, tmp_path: Path, room: Any) -> None:
    peaks = []
    for free in (1 << 16, 1 << 40):
        room(free)
        work = _workload(llama_folder, formats=("nvfp4",))
        # Of two layers: inputs of q/k/v, o, gate/up with 128 channels, of down with 256.
        assert sorted(work.input_widths) == [128] * 6 + [256] * 2
        peaks.append(memory_module._calibrating(work, free))
    squares = [4 * width * width for width in work.input_widths]
    # With little room one at a time, and never less than the largest.
    assert peaks[1] - peaks[0] <= sum(squares) - max(squares)
    assert peaks[1] > peaks[0]


def test_the_store_holds_what_was_said(llama_folder: Path, quick: Any, tmp_path: Path) -> None:
    study = autoq.search(llama_folder, **{**quick, "measure": False})
    arrays = study.store.arrays(study.id, CALIBRATION)
    codes = sum(array.nbytes for name, array in arrays.items() if name.startswith("codes|"))
    work = _workload(llama_folder, formats=quick["formats"])
    assert codes == work.searched_weights // 2
    stored = sum(np.asarray(array).nbytes for array in arrays.values())
    # Importances are counted for every matrix, and members of a fusion set share theirs.
    assert stored <= work.calibration_bytes <= 1.2 * stored


def test_experts_that_a_token_does_not_reach_cost_no_time(tmp_path: Path) -> None:
    work = _workload(write_family_model("mixtral", tmp_path / "model"), formats=("fp8",))
    config = load_model(tmp_path / "model").config
    assert work.active_share == config.num_experts_per_tok / config.num_local_experts
    assert 0.0 < work.active_share < 1.0


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "t5", "mixtral", "gemma3"])
def test_every_kind_of_model_can_be_estimated(family: str, tmp_path: Path) -> None:
    found = estimate(
        write_family_model(family, tmp_path / "model"), tmp_path, formats=("fp8", "nvfp4")
    )
    assert found.fits
    assert found.peak_bytes > found.used_memory_bytes
    assert json.loads(json.dumps(found.to_json()))["fits"] is True


def test_too_little_memory_is_said_with_what_would_do(
    llama_folder: Path, tmp_path: Path, room: Any
) -> None:
    options = {"batch_size": 64, "calibration_sequences": 64, "sequence_length": 128}
    room(GIB)
    large = estimate(llama_folder, tmp_path, reads_data=False, **options)
    needed = large.peak_bytes - large.used_memory_bytes
    assert large.fits

    room(needed // 4)
    found = estimate(llama_folder, tmp_path, reads_data=False, **options)
    (misfit,) = found.misfits
    assert misfit.what == "memory"
    assert misfit.needed_bytes == found.peak_bytes > misfit.free_bytes
    assert not found.fits
    assert "--batch-size 1" in misfit.remedies
    # It would indeed.
    assert estimate(llama_folder, tmp_path, reads_data=False, **{**options, "batch_size": 1}).fits
    assert "--no-measure" not in misfit.remedies  # scoring needs more than measuring

    room(0)
    (misfit,) = estimate(llama_folder, tmp_path, **options, reads_data=False).misfits
    assert misfit.remedies == ()


def test_a_bound_on_memory_is_proposed_where_it_would_do(
    llama_folder: Path, tmp_path: Path, room: Any
) -> None:
    options = {"batch_size": 512, "calibration_sequences": 512, "sequence_length": 128}
    options["reads_data"] = False
    with pytest.raises(InputError, match="give --max-memory") as refusal:
        estimate(llama_folder, tmp_path, max_memory="100MB", **options)
    least = float(str(refusal.value).split("give --max-memory ")[1].split("GB")[0]) * 1e9
    room(1 << 40)
    large = estimate(llama_folder, tmp_path, **options)
    between = (least + large.peak_bytes) / 2
    assert least + 2e8 < large.peak_bytes
    room(int((between - large.used_memory_bytes) / 0.95))
    (misfit,) = estimate(llama_folder, tmp_path, **options).misfits
    option, bound = misfit.remedies[-1].split()
    assert option == "--max-memory"
    assert least <= float(bound.removesuffix("GB")) * 1e9 <= between
    assert estimate(llama_folder, tmp_path, max_memory=bound, **options).fits


def test_a_store_and_a_checkpoint_share_a_disk(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    both = estimate(llama_folder, tmp_path, export=tmp_path / "out")
    needed = both.store_bytes + both.checkpoint_bytes
    for free, fits in ((2 * needed, True), (needed - 1, False)):
        monkeypatch.setattr(disk.shutil, "disk_usage", lambda _, free=free: usage(0, 0, free))
        found = estimate(llama_folder, tmp_path, export=tmp_path / "new" / "out")
        assert found.fits == fits
    (misfit,) = found.misfits
    assert (misfit.what, misfit.needed_bytes, misfit.free_bytes) == ("disk", needed, needed - 1)
    assert misfit.remedies == ("--store on another disk", "--export on another disk")
    # A database elsewhere takes nothing here.
    assert estimate(llama_folder, tmp_path, store="postgresql+psycopg://host/db").fits
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: usage(0, 0, 0))
    assert not estimate(llama_folder, tmp_path, store=str(tmp_path / "named.db")).fits
    assert estimate(llama_folder, tmp_path, store=":memory:").fits


def test_what_a_search_would_refuse_is_refused_at_once(tmp_path: Path) -> None:
    folder = write_family_model("llama", tmp_path / "model")
    np.save(tmp_path / "ids.npy", np.zeros((3, 32), dtype=np.int64))
    with pytest.raises(DataError):
        estimate(folder, tmp_path, calibration_data=str(tmp_path / "ids.npy"))
    with pytest.raises(InputError, match="batch_size"):
        estimate(folder, tmp_path, batch_size=0)
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="and that file is missing"):
        estimate(folder, tmp_path)
    with pytest.raises(ModelError, match="does not exist"):
        estimate(tmp_path / "nowhere", tmp_path)


def _workload(folder: Path, **options: Any) -> Any:
    from autoq.api.config import ScoringConfig

    sizes = {key: value for key, value in SMALL.items() if key != "held_out_sequences"}
    return estimating._workload(folder, ScoringConfig(**{**sizes, **options}), 2, False)


def _random_model(kind: str, folder: Path) -> Path:
    """A bfloat16 model of random weights, large enough to be seen beside the libraries."""
    sizes = {"vocab_size": 16_000, "num_attention_heads": 8, "num_key_value_heads": 8}
    if kind == "wide":
        settings = transformers.LlamaConfig(
            hidden_size=1024, intermediate_size=2816, num_hidden_layers=2, **sizes
        )
    else:
        settings = transformers.MixtralConfig(
            hidden_size=512,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_local_experts=8,
            num_experts_per_tok=2,
            **sizes,
        )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(settings)
    model.to(torch.bfloat16).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(model_path()).save_pretrained(folder)
    return folder


_SEARCH = """
import json, sys
from autoq.memory import peak_rss_bytes
options = json.loads(sys.argv[1])
if sys.argv[2] == "estimate":
    from autoq.api.preflight import preflight
    print(preflight(**options).peak_bytes)
else:
    import autoq
    autoq.search(**options, effective_bits=6.0)
    print(peak_rss_bytes())
"""

FACTOR = 1.5
"""Between the estimate of peak memory and what is measured, either way. Half of what a search of so
small a model takes are libraries, whose size a fresh process knows; of the rest a third is what the
allocator keeps, and what loading maps."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bundled", "wide", "mixture"])
def test_peak_memory_is_within_the_factor(kind: str, tmp_path: Path) -> None:
    model = model_path() if kind == "bundled" else _random_model(kind, tmp_path / "model")
    options = {**SMALL, "model": str(model), "formats": ["fp8", "nvfp4"], "sequence_length": 128}
    options["store"] = f"sqlite:///{tmp_path / 'store.db'}"

    def in_a_process(what: str) -> int:
        command = [sys.executable, "-c", _SEARCH, json.dumps(options), what]
        return int(subprocess.check_output(command, text=True).splitlines()[-1])

    guessed, taken = in_a_process("estimate"), in_a_process("search")
    assert taken / FACTOR < guessed < taken * FACTOR


def test_a_streamed_search_needs_disk_for_what_blocks_give(tmp_path: Path) -> None:
    model = write_family_model("llama", tmp_path / "model")
    asked = {"formats": ("fp8",), "calibration_sequences": 64, "sequence_length": 32}
    least = _needs(model, **asked).least
    found = estimate(model, tmp_path, **asked, max_memory=least)
    width = load_model(model).config.hidden_size
    # A block's inputs and outputs, of all tokens, in float32; nothing is left of the least bound.
    assert found.temporary_bytes == 2 * 64 * 32 * width * 4
    roomy = estimate(model, tmp_path, **asked, max_memory=least + 4 * found.temporary_bytes)
    assert roomy.temporary_bytes == 0
    assert estimate(model, tmp_path, **asked).temporary_bytes == 0


def test_the_bound_counts_the_experts_that_a_token_runs_through(tmp_path: Path) -> None:
    one, three = (
        _needs(_mixture(tmp_path / str(taken), taken), sequence_length=16, batch_size=1)
        for taken in (1, 3)
    )
    config = load_model(tmp_path / "1").config
    hidden, inner = config.hidden_size, config.intermediate_size
    of_an_expert = (hidden + 2 * inner) + (inner + hidden)  # gate and up as one, and down
    assert three.activations - one.activations == 2 * of_an_expert * 16 * 4


def _mixture(folder: Path, taken: int) -> Path:
    """A mixture whose tokens run through so many experts."""
    write_family_model("mixtral", folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_experts_per_tok"] = taken
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _needs(model: Path, **options: Any) -> MemoryNeeds:
    return estimating._needs_of(_workload(model, **options), model)
