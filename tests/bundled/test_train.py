"""The trainer: its schedule, the size of its model and its checkpoints."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from autoq.bundled.tokenizer import train_tokenizer
from autoq.bundled.train import Trainer, learning_rate, new_model


def test_learning_rate_rises_then_falls() -> None:
    rates = [learning_rate(step / 100, peak=1.0) for step in range(101)]
    top = rates.index(max(rates))
    assert rates[0] < 0.1 and 0.9 < rates[top] <= 1.1 and rates[-1] < 0.05
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)


def test_the_model_fits_into_eight_megabytes() -> None:
    assert 2 * sum(weight.numel() for weight in new_model().parameters()) < 7_950_000


def test_a_run_continues_from_its_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = argparse.Namespace(
        out=tmp_path,
        minutes=0.01,
        seed=0,
        batch=1,
        rate=1e-3,
        log_seconds=100.0,
        checkpoint_seconds=100.0,
        compile=False,
    )
    tokenizer = train_tokenizer(seed=0)
    trained = Trainer(arguments, tokenizer)
    trained.run()
    trained.save_checkpoint()
    assert "held-out perplexity" in capsys.readouterr().out

    continued = Trainer(arguments, tokenizer)
    continued.load_checkpoint()
    assert continued.progress == trained.progress
    pairs = zip(trained.model.parameters(), continued.model.parameters(), strict=True)
    for ours, theirs in pairs:
        assert torch.equal(ours, theirs)
        moments = continued.optimizer.state[theirs]
        for name, value in trained.optimizer.state[ours].items():
            assert torch.equal(value, moments[name])
