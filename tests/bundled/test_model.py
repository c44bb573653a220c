"""The bundled model: its size, its recorded quality, and that it has learned the language."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from autoq.bundled import model_path
from autoq.bundled.language import documents, multiple_choice_questions
from autoq.bundled.scoring import (
    choice_accuracy,
    held_out_sequences,
    packed_sequences,
    perplexity,
)


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((model_path() / "training.json").read_text("utf-8"))
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    loaded = AutoTokenizer.from_pretrained(model_path())
    assert isinstance(loaded, PreTrainedTokenizerFast)
    return loaded


@pytest.fixture(scope="module")
def model() -> Iterator[Any]:
    yield AutoModelForCausalLM.from_pretrained(model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out(record: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> torch.Tensor:
    stated = record["held_out"]
    return held_out_sequences(tokenizer, stated["seed"], stated["tokens"])


@pytest.fixture(scope="module")
def measured(model: Any, held_out: torch.Tensor) -> float:
    return perplexity(model, held_out)


def test_the_folder_is_small_and_complete() -> None:
    sizes = {path.name: path.stat().st_size for path in model_path().iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(sizes)
    assert {"model.safetensors", "tokenizer_config.json", "training.json"} <= set(sizes)
    assert sum(sizes.values()) < 8_000_000


def test_the_model_has_the_stated_shape(model: Any, record: dict[str, Any]) -> None:
    assert model.config.model_type == "llama"
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert sum(weight.numel() for weight in model.parameters()) == record["parameters"]


def test_perplexity_is_the_recorded_one(measured: float, record: dict[str, Any]) -> None:
    assert measured == pytest.approx(record["held_out"]["perplexity"], rel=0.02)


def test_perplexity_is_far_below_word_frequencies(
    measured: float, held_out: torch.Tensor, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = itertools.islice(packed_sequences(tokenizer, 0, "train"), 400)
    counts = torch.bincount(torch.tensor(list(rows)).flatten(), minlength=len(tokenizer)) + 1.0
    surprisal = -(counts / counts.sum()).log()
    unigram = math.exp(surprisal[held_out[:, 1:]].mean().item())
    assert measured < unigram / 5
    assert measured > 2.0, "a trivial language would not show quantisation errors"


def test_questions_are_answered(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    accuracy = choice_accuracy(model, tokenizer, multiple_choice_questions(1, 80))
    assert accuracy["fact"] > 0.8
    assert accuracy["agreement"] > 0.8
    assert accuracy["arithmetic"] > 0.7
    # Recall is left out: the model only does it somewhat better than chance (see training.json).


def test_the_tokenizer_restores_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in itertools.islice(documents(0, "calibration"), 20):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(tokenizer("Grüße, 日本!")["input_ids"][1:]) == "Grüße, 日本!"
