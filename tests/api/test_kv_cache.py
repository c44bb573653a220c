"""Searching the key/value cache's formats: beside the weights, stored, measured, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import autoq
from autoq.api import kv_cache
from autoq.api.cache_plans import (
    KV_CACHE,
    CacheWish,
    cache_formats,
    plan_of_weights,
    stored_layers,
    with_cache,
)
from autoq.errors import ExportError, InputError, ModelError, UnknownNameError
from autoq.formats import FormatName
from autoq.layers.kv_cache import cache_scale, fake_quantize_cache, watched_cache
from autoq.models import forward_logits
from autoq.testing.tiny_models import write_tiny_model
from tests.api.refinements import SMALL

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
FP8 = FormatName("fp8")
NVFP4 = FormatName("nvfp4")


def search(folder: Path, quick: Any, **options: Any) -> Any:
    return autoq.search(folder, **{**quick, **options})


def test_without_it_nothing_changes_and_with_it_the_study_is_the_same(
    llama_folder: Path, quick: Any
) -> None:
    plain = search(llama_folder, quick)
    before = plain.summary()
    study = search(llama_folder, quick, kv_formats=("fp8", "nvfp4"), kv_bits=4.5)
    assert study.id == plain.id
    after = study.summary()
    assert before["kv_cache"] is None
    assert after["assignment"] == before["assignment"]
    cache = after["kv_cache"]
    assert [layer["format"] for layer in cache["layers"]] == ["nvfp4", "nvfp4"]
    assert [layer["name"] for layer in cache["layers"]] == LAYERS
    assert cache["bits"] == 4.5
    # Two layers of two heads of 32, keys and values: 256 elements of 4.5 bits.
    assert cache["bytes_per_token"] == 256 * 4.5 / 8
    assert cache["predicted_loss"] == pytest.approx(
        sum(layer["scores"]["nvfp4"] for layer in cache["layers"])
    )
    assert after["predicted_loss"] == pytest.approx(
        before["predicted_loss"] + cache["predicted_loss"]
    )
    assert after["gap"] < 1e-6
    assert after["measured"]["kl_divergence"] != before["measured"]["kl_divergence"]
    again = search(llama_folder, quick)
    assert again.summary()["measured"] == before["measured"]
    assert again.summary()["kv_cache"] is None


def test_scores_are_computed_once_and_layers_may_differ(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kv_formats": ("fp8", "int8", "nvfp4"), "measure": False}
    search(llama_folder, quick, kv_bits=8, **options)
    monkeypatch.setattr(kv_cache, "calibrate_cache", None)  # called again, it would fail
    study = search(llama_folder, quick, kv_bits=6.3, kv_scope="layer", **options)
    cache = study.summary()["kv_cache"]
    formats = [layer["format"] for layer in cache["layers"]]
    assert formats.count("nvfp4") == 1  # two layers alike in size: 6.25 bits, not 4.5 or 8
    scores = [layer["scores"] for layer in cache["layers"]]
    best = min(
        scores[0][first] + scores[1][second]
        for first, second in (
            ("nvfp4", "fp8"),
            ("nvfp4", "int8"),
            ("fp8", "nvfp4"),
            ("int8", "nvfp4"),
        )
    )
    assert cache["predicted_loss"] == pytest.approx(best)
    # Another budget of the weights keeps the wish for the cache.
    other = study.plan(5.0)
    assert cache_formats(other) == dict(zip(LAYERS, formats, strict=True))
    assert study.plan(5.0).id == other.id


def test_a_killed_pass_goes_on_behind_its_last_batch(
    llama_folder: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"kv_formats": ("fp8", "nvfp4"), "measure": False}
    other = {**quick, "store": quick["store"].replace("studies.db", "other.db")}
    expected = search(llama_folder, other, **options)
    score, calls = kv_cache.CacheScorer.score_batch, []

    def dying(scorer: Any, loss: Any) -> Any:
        calls.append(loss)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return score(scorer, loss)

    monkeypatch.setattr(kv_cache.CacheScorer, "score_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        search(llama_folder, quick, **options)
    monkeypatch.setattr(kv_cache, "calibrate_cache", None)  # called again, it would fail
    study = search(llama_folder, quick, **options)
    assert len(calls) == 4  # of three batches, one of them twice
    stored = study.store.arrays(study.id, kv_cache.KV_CACHE)
    whole = expected.store.arrays(expected.id, kv_cache.KV_CACHE)
    assert stored["contributions"].tobytes() == whole["contributions"].tobytes()
    assert stored_layers(study) == stored_layers(expected)
    assert [name for name, array in stored.items() if array.size] == ["contributions"]


@torch.no_grad()
def test_what_is_measured_has_the_cache_quantised(llama_folder: Path, quick: Any) -> None:
    study = search(llama_folder, quick, kv_formats=("fp8",), measure=False)
    plan = study.plan()
    simulated = study.simulate(plan)
    ids = torch.arange(4, 24)[None]
    found = forward_logits(simulated.model, ids)
    simulated.restore()
    weights = study.simulate(study.solve(6.0))
    by_name = {layer.name: layer for layer in stored_layers(study)}

    def quantise(name: str, keys: Any, values: Any) -> Any:
        layer = by_name[name]
        return (
            fake_quantize_cache(keys, FP8, cache_scale(FP8, layer.key_amax)),
            fake_quantize_cache(values, FP8, cache_scale(FP8, layer.value_amax)),
        )

    without = forward_logits(weights.model, ids)
    with watched_cache(weights.model, LAYERS, quantise):
        assert torch.equal(forward_logits(weights.model, ids), found)
    weights.restore()
    assert not torch.equal(without, found)


def test_measuring_several_plans_leaves_no_cache_behind(llama_folder: Path, quick: Any) -> None:
    plain = search(llama_folder, quick, compare_uniform=True)
    expected = {row["label"]: row["metrics"] for row in plain.summary()["measurements"]}
    other = {**quick, "store": quick["store"].replace("studies.db", "other.db")}
    study = search(llama_folder, other, kv_formats=("nvfp4",), compare_uniform=True)
    rows = {row["label"]: row["metrics"] for row in study.summary()["measurements"]}
    (chosen,) = rows.keys() - expected.keys()
    assert "KV cache of nvfp4" in chosen
    for label in ("uniform fp8", "uniform nvfp4"):
        assert rows[label] == expected[label]


def test_refinement_is_of_weights_and_keeps_the_cache(llama_folder: Path, quick: Any) -> None:
    study = search(llama_folder, quick, kv_formats=("fp8",))
    start = study.plan()
    result = study.refine(trials=2, **SMALL)
    assert KV_CACHE not in result.plan.details
    better = study.solve(5.0)  # stands for what trials might find
    study.set_refined(plan_of_weights(study, start), better)
    refined = study.plan()
    assert refined.assignment == better.assignment
    assert cache_formats(refined) == cache_formats(start)


def test_the_wish_needs_scores(llama_folder: Path, quick: Any) -> None:
    study = search(llama_folder, quick, measure=False)
    with pytest.raises(InputError, match="no scores of the key/value cache"):
        with_cache(study, study.plan(), CacheWish(formats=(FP8,)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_bits": 8}, "--kv-bits and --kv-scope need"),
        ({"kv_scope": "layer"}, "--kv-bits and --kv-scope need"),
        ({"kv_formats": ("fp8",), "kv_scope": "head"}, "must be model or layer, got 'head'"),
        ({"kv_formats": ("none",)}, "at least one quantised format"),
        ({"kv_formats": ("fp8",), "kv_bits": 4.5}, "at least 8 for a cache in fp8, got 4.5"),
        ({"kv_formats": ("fp8",), "max_kl": 0.1}, "--max-kl measures plans of weights alone"),
        (
            {"kv_formats": ("int8",), "container": "modelopt"},
            "int8 does not go with modelopt: no engine reads",
        ),
        (
            {"kv_formats": ("fp8", "nvfp4"), "container": "compressed-tensors"},
            "nvfp4 does not go with compressed-tensors",
        ),
        (
            {"kv_formats": ("fp8",), "kv_scope": "layer", "container": "modelopt"},
            "state one format of the key/value cache for all layers",
        ),
        (
            {"kv_formats": ("fp8",), "kv_scope": "layer", "export": "somewhere"},
            "state one format of the key/value cache for all layers",
        ),
        (
            {"kv_formats": ("nvfp4",), "formats": ("fp8",), "target": "tensorrt-llm:h200"},
            "nvfp4 does not go with tensorrt-llm:h200 .*begin with 10.0",
        ),
        ({"kv_formats": ("int8",), "target": "sglang:h200"}, "takes no key/value cache in INT8"),
    ],
)
def test_what_cannot_be_is_refused_before_work(
    llama_folder: Path, quick: Any, options: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoq.api.search_setup.load", None)  # reached, it would be another error
    with pytest.raises(InputError, match=words):
        search(llama_folder, quick, **options)


def test_unknown_names_and_models_without_a_cache(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    with pytest.raises(UnknownNameError, match="'fp9'"):
        search(llama_folder, quick, kv_formats=("fp9",))
    folder = write_tiny_model("t5", tmp_path / "t5")
    with pytest.raises(ModelError, match="has an encoder"):
        search(folder, quick, kv_formats=("fp8",))


# Exporting


@pytest.mark.parametrize(
    ("container", "fmt"), [("modelopt", "nvfp4"), ("compressed-tensors", "fp8")]
)
def test_a_search_that_exports_writes_the_cache_and_it_is_measured(
    llama_folder: Path, quick: Any, tmp_path: Path, container: str, fmt: str
) -> None:
    study = search(
        llama_folder,
        quick,
        kv_formats=(fmt,),
        container=container,
        export=tmp_path / "out",
        dtype="float32",
    )
    assert study.summary()["export"]["container"] == container
    options = {"reference": llama_folder, "sequences": 2, "sequence_length": 32, "batch_size": 2}
    found = autoq.evaluate(tmp_path / "out", dtype="float32", **options)["metrics"]
    measured = study.summary()["measured"]
    assert found["kl_divergence"]["value"] == pytest.approx(measured["kl_divergence"], rel=1e-6)
    plain = search(llama_folder, quick, container=container, dtype="float32").summary()["measured"]
    assert measured["kl_divergence"] != pytest.approx(plain["kl_divergence"], rel=1e-3)


def test_what_cannot_be_exported_is_refused_with_the_reason(
    llama_folder: Path, quick: Any, tmp_path: Path
) -> None:
    study = search(llama_folder, quick, kv_formats=("int8",), measure=False)
    for container, words in (
        ("modelopt", "in int8 from modelopt"),
        ("onnx", "writes no format of the key/value cache into onnx"),
    ):
        with pytest.raises(ExportError, match=words):
            study.export(tmp_path / "out", container=container)
    written = study.export(tmp_path / "engine", container="tensorrt-llm")
    assert written["verification"]["cache_scales"] == 2  # of two layers
    config = json.loads((tmp_path / "engine" / "config.json").read_text(encoding="utf-8"))
    assert config["quantization"]["kv_cache_quant_algo"] == "INT8"
    formats = ("fp8", "nvfp4")
    study = search(
        llama_folder, quick, kv_formats=formats, kv_bits=6.3, kv_scope="layer", measure=False
    )
    with pytest.raises(ExportError, match="one format of the key/value cache for all layers"):
        study.export(tmp_path / "out")
    assert not (tmp_path / "out").exists()
