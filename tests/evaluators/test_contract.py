"""Every registered evaluator keeps the contract, and the kit notices one that does not."""

from contextlib import nullcontext
from dataclasses import dataclass

import pytest
import torch

from autoq.errors import EvaluationError
from autoq.evaluators import EVALUATORS, Estimate, Metric, Need, Reference, Subject
from autoq.evaluators.generation import GenerationAgreement
from autoq.evaluators.metrics import check_values, known_metrics
from autoq.evaluators.packed_cost import weight_bytes
from autoq.testing.evaluators import EvaluatorContract, disturbed, tiny_batches
from autoq.testing.tiny_models import make_tiny_model


class TestRegisteredEvaluators(EvaluatorContract):
    @pytest.fixture(params=sorted(EVALUATORS))  # registered, therefore tested
    def evaluator(self, request):
        return EVALUATORS[request.param]


def test_what_users_can_name():
    assert set(EVALUATORS) == {
        "kl_divergence",
        "top1_agreement",
        "perplexity",
        "cosine_similarity",
        "generation_agreement",
        "packed_cost",
        "noise_floor",
    }


def test_no_two_evaluators_give_the_same_metric():
    names = [metric.name for evaluator in EVALUATORS.values() for metric in evaluator.metrics]
    assert len(names) == len(set(names)) == len(known_metrics())


@dataclass(frozen=True)
class Careless:
    """Breaks one rule of the contract, which it is told."""

    fault: str
    name: str = "careless"
    metrics: tuple = (Metric(name="careless", better="lower", perfect=0.0),)
    needs: frozenset = frozenset({Need.LOGITS})

    def evaluate(self, subject, reference):
        honest = EVALUATORS["kl_divergence"].evaluate(subject, reference)["kl_divergence"]
        value = honest.value
        if self.fault == "changes_weights":
            subject.model.lm_head.weight.data.mul_(2.0)
        if self.fault == "leaves_hook":
            subject.model.register_forward_hook(lambda *_: None)
        if self.fault == "random":
            value += float(torch.rand(()))
        if self.fault == "not_perfect":
            value += 1.0
        if self.fault == "wrong_direction":
            value = -value
        name = "another" if self.fault == "undeclared" else "careless"
        low = value + 1.0 if self.fault == "interval" else value
        return {name: Estimate(value, low, low + 10.0)}


CONTRACT = EvaluatorContract()


@pytest.mark.parametrize(
    ("fault", "check"),
    [
        ("changes_weights", "test_it_leaves_both_models_as_they_were"),
        ("leaves_hook", "test_it_leaves_both_models_as_they_were"),
        ("random", "test_it_gives_the_same_bits_again"),
        ("not_perfect", "test_the_original_beside_itself_is_perfect"),
        ("wrong_direction", "test_more_noise_in_the_weights_is_worse"),
        ("undeclared", "test_it_gives_finite_numbers_that_it_declares"),
        ("interval", "test_it_gives_finite_numbers_that_it_declares"),
    ],
)
def test_the_kit_notices(fault, check):
    original = make_tiny_model("llama", dtype=torch.float32)
    given = {
        "evaluator": Careless(fault),
        "original": original,
        "subject": Subject(model=disturbed(original, 0.1)),
        "reference": Reference(tiny_batches(), lambda: nullcontext(original)),
    }
    method = getattr(CONTRACT, check)
    wanted = method.__func__.__code__.co_varnames[1 : method.__func__.__code__.co_argcount]
    with pytest.raises(AssertionError):
        method(**{name: given[name] for name in wanted})


class Scripted(torch.nn.Module):
    """Continues with given tokens, whatever it is asked."""

    def __init__(self, tokens, vocabulary=8):
        super().__init__()
        self.tokens = tokens
        self.generation_config = type("Config", (), {"pad_token_id": None})()
        self.config = type("Config", (), {"is_encoder_decoder": False})()
        self._vocabulary = vocabulary

    def forward(self, input_ids):
        logits = torch.zeros(*input_ids.shape, self._vocabulary)
        return type("Output", (), {"logits": logits})()

    def generate(self, input_ids, *, max_new_tokens, min_new_tokens, **_):
        assert max_new_tokens == min_new_tokens == len(self.tokens)
        return torch.cat([input_ids, torch.tensor([self.tokens])], dim=1)


def test_agreement_and_divergence_of_continuations_by_hand():
    evaluator = GenerationAgreement(prompts=2, prompt_tokens=4, new_tokens=5)
    reference = Reference(
        [torch.zeros(3, 6, dtype=torch.int64)], lambda: nullcontext(Scripted([1, 2, 3, 4, 5]))
    )
    found = evaluator.evaluate(Subject(model=Scripted([1, 2, 7, 4, 5])), reference)
    assert found["generation_agreement"].value == 0.8
    assert found["first_divergence"].value == 2.0
    same = evaluator.evaluate(Subject(model=Scripted([1, 2, 3, 4, 5])), reference)
    assert same["first_divergence"].value == 5.0
    assert same["first_divergence"].per_sequence == (5.0, 5.0)


def test_continuations_need_sequences():
    with pytest.raises(EvaluationError, match="no sequence"):
        GenerationAgreement().evaluate(
            Subject(model=Scripted([])), Reference([], lambda: nullcontext(Scripted([])))
        )


def test_bytes_of_weights_count_what_is_shared_once():
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3))
    model[1].weight = model[0].weight
    model.register_buffer("scale", torch.zeros(5, dtype=torch.float16))
    assert weight_bytes(model) == 4 * (12 + 3) + 2 * 5


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_none_fail_the_trial(value):
    with pytest.raises(EvaluationError, match="careless came out as"):
        check_values({"careless": Estimate(value, 0.0, 1.0)})
