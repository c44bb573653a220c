"""Activation outliers: the function stays, the activations grow, unknown models are refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from autoq.bundled import outliers
from autoq.bundled.outliers import add_activation_outliers


def small_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    model: Any = LlamaForCausalLM(config)
    return model.eval()


def logits_and_peaks(model: Any) -> tuple[torch.Tensor, list[float]]:
    peaks: list[float] = []

    def record(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        peaks.append(arguments[0].abs().max().item())

    readers = [
        module
        for name, module in model.named_modules()
        if name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"))
    ]
    handles = [module.register_forward_pre_hook(record) for module in readers]
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(64)[None]).logits
    for handle in handles:
        handle.remove()
    return logits, peaks


def test_logits_stay_and_activations_grow() -> None:
    model = small_model()
    before, peaks_before = logits_and_peaks(model)
    add_activation_outliers(model)
    after, peaks_after = logits_and_peaks(model)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
    assert len(peaks_after) == 10
    for small, large in zip(peaks_before, peaks_after, strict=True):
        assert large > 4 * small


def test_one_channel_in_64_is_chosen_with_factors_in_range() -> None:
    model = small_model()
    add_activation_outliers(model, low=20.0, high=60.0)
    for layer in model.model.layers:
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            raised = norm.weight[norm.weight != 1.0]
            assert raised.numel() == 2
            assert bool(((raised >= 20.0) & (raised <= 60.0)).all())
    assert bool((model.model.norm.weight == 1.0).all())


def test_the_seed_decides() -> None:
    def norms(seed: int) -> torch.Tensor:
        model = small_model()
        add_activation_outliers(model, channels_per_norm=3, seed=seed)
        return torch.stack([layer.input_layernorm.weight for layer in model.model.layers])

    assert torch.equal(norms(1), norms(1))
    assert not torch.equal(norms(1), norms(2))


def test_other_models_are_refused() -> None:
    other = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1))
    with pytest.raises(ValueError, match="no list of blocks"):
        add_activation_outliers(other)
    with pytest.raises(ValueError, match="no list of blocks"):
        add_activation_outliers(torch.nn.Linear(2, 2))


def test_norms_that_are_not_proportional_to_their_weight_are_refused() -> None:
    model = small_model()
    model.model.layers[1].input_layernorm = torch.nn.LayerNorm(128)
    torch.nn.init.ones_(model.model.layers[1].input_layernorm.bias)
    unchanged = model.model.layers[0].input_layernorm.weight.clone()
    with pytest.raises(ValueError, match="not proportional"):
        add_activation_outliers(model)
    assert torch.equal(model.model.layers[0].input_layernorm.weight, unchanged)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="low"):
        add_activation_outliers(small_model(), low=3.0, high=2.0)
    with pytest.raises(ValueError, match="cannot choose 129 of 128"):
        add_activation_outliers(small_model(), channels_per_norm=129)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    model = small_model()
    model.save_pretrained(source)
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    make: Any = PreTrainedTokenizerFast
    make(tokenizer_object=tokenizer).save_pretrained(source)
    monkeypatch.setattr(sys, "argv", ["outliers", str(source), str(target), "--seed", "3"])
    outliers.main()
    written = AutoModelForCausalLM.from_pretrained(target)
    torch.testing.assert_close(
        logits_and_peaks(written)[0], logits_and_peaks(model)[0], rtol=1e-4, atol=1e-5
    )
    assert (target / "tokenizer.json").exists()
