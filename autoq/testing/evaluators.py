"""What every evaluator must keep, as tests to inherit.

Give a class of your own the fixture `evaluator`, and your evaluator is held to its contract:

    class TestMine(EvaluatorContract):
        @pytest.fixture
        def evaluator(self):
            return Mine()

Needs pytest.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autoq.errors import EvaluationError, InputError
from autoq.evaluators import Evaluator, Need, Reference, Subject
from autoq.evaluators.protocol import check_needs
from autoq.models import fingerprint_of_module
from autoq.testing.tiny_models import make_byte_tokenizer, make_tiny_model, write_tiny_model

ROUNDING = 1e-9
"""Cosines and means of equal float64 numbers may be off by some units in the last place."""


class EvaluatorContract:
    """Checks of one evaluator, given by the fixture `evaluator`."""

    ignores_outputs = frozenset({"packed_cost", "noise_floor"})
    """Evaluators whose numbers say nothing about what the model gives."""

    @pytest.fixture
    def original(self, evaluator: Evaluator) -> nn.Module:
        """The model that others are measured beside."""
        return tiny_original(evaluator)

    @pytest.fixture
    def subject(self, evaluator: Evaluator, original: nn.Module) -> Subject:
        """A model that differs from the original and meets the evaluator's needs."""
        if Need.PACKED in evaluator.needs:
            return Subject(model=packed_tiny_model(), tokenizer=make_byte_tokenizer())
        return Subject(model=disturbed(original, 0.1), tokenizer=make_byte_tokenizer())

    @pytest.fixture
    def reference(self, original: nn.Module) -> Reference:
        """The original, on a few sequences in two batches."""
        return Reference(tiny_batches(), lambda: nullcontext(original))

    def test_it_gives_finite_numbers_that_it_declares(
        self, evaluator: Evaluator, subject: Subject, reference: Reference
    ) -> None:
        """Every number has its declared name and lies in its interval."""
        found = evaluator.evaluate(subject, reference)
        assert found
        assert set(found) <= {metric.name for metric in evaluator.metrics}
        for name, estimate in found.items():
            assert math.isfinite(estimate.value), name
            assert estimate.low - ROUNDING <= estimate.value <= estimate.high + ROUNDING, name
            assert len(estimate.per_sequence) in (0, reference.sequences), name

    def test_it_leaves_both_models_as_they_were(
        self, evaluator: Evaluator, subject: Subject, original: nn.Module, reference: Reference
    ) -> None:
        """Weights, hooks, and the modes of all modules."""
        before = [_state(model) for model in (subject.model, original)]
        evaluator.evaluate(subject, reference)
        assert [_state(model) for model in (subject.model, original)] == before

    def test_it_gives_the_same_bits_again(
        self, evaluator: Evaluator, subject: Subject, original: nn.Module, reference: Reference
    ) -> None:
        """But for metrics that say they are not repeatable."""
        anew = Reference(tiny_batches(), lambda: nullcontext(original))
        first, second = (evaluator.evaluate(subject, beside) for beside in (reference, anew))
        repeatable = [m.name for m in evaluator.metrics if m.repeatable and m.name in first]
        assert repeatable
        assert {n: first[n] for n in repeatable} == {n: second[n] for n in repeatable}

    def test_the_original_beside_itself_is_perfect(
        self, evaluator: Evaluator, original: nn.Module, reference: Reference
    ) -> None:
        """Where a metric says what perfect is."""
        perfect = {m.name: m.perfect for m in evaluator.metrics if m.perfect is not None}
        if not perfect:
            pytest.skip("no metric of it has a perfect value")
        itself = Subject(model=copy.deepcopy(original), tokenizer=make_byte_tokenizer())
        found = evaluator.evaluate(itself, reference)
        for name in perfect.keys() & found.keys():
            assert found[name].value == pytest.approx(perfect[name], abs=ROUNDING), name

    def test_more_noise_in_the_weights_is_worse(
        self, evaluator: Evaluator, original: nn.Module, reference: Reference
    ) -> None:
        """And any is worse than perfect, in the direction that the metric says."""
        directed = [m for m in evaluator.metrics if m.perfect is not None]
        if not directed:
            pytest.skip("no metric of it has a perfect value")
        few, much = (
            evaluator.evaluate(
                Subject(model=disturbed(original, share), tokenizer=make_byte_tokenizer()),
                reference,
            )
            for share in (0.02, 2.0)
        )
        for metric in directed:
            if metric.name not in few:
                continue
            sign = 1.0 if metric.better == "lower" else -1.0
            assert metric.perfect is not None
            assert sign * few[metric.name].value >= sign * metric.perfect - ROUNDING, metric.name
            assert sign * much[metric.name].value > sign * few[metric.name].value, metric.name

    def test_a_model_that_lacks_what_it_needs_is_refused(self, evaluator: Evaluator) -> None:
        """By name, before anything runs."""
        assert evaluator.needs
        for need in evaluator.needs:
            with pytest.raises(InputError, match=evaluator.name) as caught:
                check_needs(evaluator, _without(need))
            assert str(need) in str(caught.value)

    def test_a_model_that_gives_nan_has_no_value(
        self, evaluator: Evaluator, original: nn.Module, reference: Reference
    ) -> None:
        """It fails by `EvaluationError`, and gives no number."""
        if evaluator.name in self.ignores_outputs:
            pytest.skip("it does not look at what the model gives")
        broken = copy.deepcopy(original)
        with torch.no_grad():
            for parameter in broken.parameters():
                parameter.fill_(math.nan)
        with pytest.raises(EvaluationError):
            evaluator.evaluate(Subject(model=broken, tokenizer=make_byte_tokenizer()), reference)


def tiny_original(evaluator: Evaluator) -> nn.Module:
    """A tiny model in float32 of the kind that the evaluator is for."""
    model: Any = make_tiny_model("llama", dtype=torch.float32)
    hidden: nn.Module = model.model
    return hidden if Need.HIDDEN in evaluator.needs else model


def tiny_batches() -> list[Tensor]:
    """Four sequences of 24 tokens in two batches, the same every time."""
    ids = torch.randint(4, 260, (4, 24), generator=torch.Generator().manual_seed(3))
    return [ids[:2], ids[2:]]


def disturbed(model: nn.Module, share: float) -> nn.Module:
    """A copy with normal noise in every matrix, of `share` of the matrix's own spread."""
    changed = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in changed.parameters():
            if parameter.ndim > 1:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise * parameter.std() * share)
    return changed


@cache
def packed_tiny_model() -> nn.Module:
    """A tiny llama, searched, exported and loaded packed; made once."""
    with TemporaryDirectory() as folder:
        return _exported_and_loaded(Path(folder))


def _exported_and_loaded(folder: Path) -> nn.Module:
    import autoq

    autoq.search(
        write_tiny_model("llama", folder / "model"),
        effective_bits=4.5,
        formats=["nvfp4", "none"],
        store=f"sqlite:///{folder}/autoq.db",
        export=folder / "out",
        calibration_sequences=1,
        sequence_length=16,
        calibration="max",
        measure=False,
    )
    model: nn.Module = autoq.load(folder / "out", dtype="float32")
    return model


def _without(need: Need) -> Subject:
    if need is Need.HIDDEN:
        return Subject(model=make_tiny_model("llama"))
    bare: Any = make_tiny_model("bert")
    return Subject(model=bare.bert)


def _state(model: nn.Module) -> Any:
    hooks = [len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.modules()]
    forwards = [vars(part).get("forward") for part in model.modules()]
    modes = [part.training for part in model.modules()]
    return fingerprint_of_module(model), hooks, forwards, modes
