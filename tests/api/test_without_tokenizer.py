"""Folders without a tokenizer, searched with token ids: only what needs text is refused."""

from __future__ import annotations

import numpy as np
import pytest

import autoq
from autoq.api.evaluating.evaluation import evaluate
from autoq.errors import InputError
from autoq.testing.tiny_models import write_tiny_model
from tests.api.refinements import SMALL

NO_WORDS = "words and bytes of word_perplexity .* there is none; copy tokenizer.json"
NO_TASKS = "tasks need the model's tokenizer, and its folder has none"


def test_metrics_of_tokens_are_measured_and_those_of_text_refused(quick, tmp_path):
    folder = write_tiny_model("llama", tmp_path / "llama")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    data = tmp_path / "ids.npy"
    np.save(data, np.random.default_rng(0).integers(0, 200, 32 * 40))
    store, export = quick["store"], tmp_path / "out"
    found = autoq.search(folder, **quick, calibration_data=str(data), export=export)

    result = found.refine(trials=2, objective="kl + 0.1*ppl", **SMALL)
    assert result.trials == 2
    assert "word_perplexity" not in evaluate(found.name, store=store, sequences=2)["metrics"]
    measured = evaluate(found.name, store=store, metrics=["ppl"], sequences=2)["metrics"]
    assert measured["perplexity"]["value"] > 1
    beside = {"reference": folder, "data": str(data), "sequences": 2, "sequence_length": 32}
    assert evaluate(export, **beside, metrics=["kl_p90"])["metrics"]["kl_p90"]["value"] > 0

    with pytest.raises(InputError, match=NO_WORDS):
        found.refine(trials=2, objective="word_perplexity", **SMALL)
    with pytest.raises(InputError, match=NO_WORDS):
        evaluate(export, **beside, metrics=["word_perplexity"])
    with pytest.raises(InputError, match=NO_TASKS):
        found.refine(trials=2, objective="kl - autoq_choices", **SMALL)
    with pytest.raises(InputError, match=NO_TASKS):
        evaluate(found.name, store=store, tasks=["autoq_choices"])
