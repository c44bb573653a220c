"""Whether greedy continuations are the original's, and how long they stay so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autoq.errors import EvaluationError
from autoq.evaluators.estimate import Estimate
from autoq.evaluators.fidelity import check_finite
from autoq.evaluators.protocol import EVALUATORS, Metric, Need, Reference, Subject
from autoq.evaluators.resampling import ratio_estimate
from autoq.models.forward import forward_logits


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationAgreement:
    """Greedy continuations of the first tokens of some sequences, beside the original's.

    Each has exactly `new_tokens` tokens: neither model may end its text before. After two texts
    part they are about different things, so equal tokens beyond that point are equal by chance, and
    `first_divergence` says more: how many tokens come before the first that differs, `new_tokens`
    if none does.
    """

    prompts: int = 16
    prompt_tokens: int = 32  # half of the sequence, if that is shorter
    new_tokens: int = 32
    name: str = "generation_agreement"

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """See `Evaluator.metrics`."""
        return (
            Metric(name="generation_agreement", better="higher", perfect=1.0),
            Metric(name="first_divergence", better="higher", perfect=float(self.new_tokens)),
        )

    @property
    def needs(self) -> frozenset[Need]:
        """See `Evaluator.needs`."""
        return frozenset({Need.GENERATION})

    def evaluate(self, subject: Subject, reference: Reference) -> Mapping[str, Estimate]:
        """See `Evaluator.evaluate`."""
        prompts = self._prompts(reference.batches)
        with torch.no_grad():  # a model whose logits are NaN generates its first token for ever
            check_finite(forward_logits(subject.model, prompts[0]), "quantised")
        expected = reference.once(self, lambda model: self._continue(model, prompts))
        found = self._continue(subject.model, prompts)
        same = [
            [a == b for a, b in zip(*rows, strict=True)]
            for rows in zip(expected, found, strict=True)
        ]
        agreement = ratio_estimate([float(sum(row)) for row in same], [len(row) for row in same])
        before = [float((*row, False).index(False)) for row in same]
        divergence = ratio_estimate(before, [1.0] * len(before))
        assert agreement is not None and divergence is not None  # there is a prompt
        return {"generation_agreement": agreement, "first_divergence": divergence}

    def _prompts(self, batches: Sequence[Tensor]) -> list[Tensor]:
        """int64 [1, tokens] each; one by one, so that no padding changes what is computed."""
        rows = [row for batch in batches for row in batch][: self.prompts]
        if not rows:
            raise EvaluationError("no sequence to continue; give at least one")
        return [row[None, : max(1, min(self.prompt_tokens, len(row) // 2))] for row in rows]

    def _continue(self, model: Any, prompts: Sequence[Tensor]) -> list[list[int]]:
        return [self._continuation(model, prompt) for prompt in prompts]

    @torch.no_grad()
    def _continuation(self, model: Any, prompt: Tensor) -> list[int]:
        output = model.generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            min_new_tokens=self.new_tokens,
            max_new_tokens=self.new_tokens,
            pad_token_id=_pad_token(model),
        )
        tokens: list[int] = output[0, -self.new_tokens :].tolist()
        return tokens


def _pad_token(model: nn.Module) -> int:
    """Never generated; models without one would say so for every prompt."""
    config: Any = model.generation_config
    return int(config.pad_token_id) if config.pad_token_id is not None else 0


EVALUATORS.register("generation_agreement", GenerationAgreement())
