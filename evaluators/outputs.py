"""Both models' outputs for one sequence, with what several metrics need computed once."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from autoq.evaluators.compact import CompactLogits
from autoq.evaluators.fidelity import token_divergence


class SequenceOutputs:
    """The original's and another model's outputs for the tokens of one sequence.

    Where the original's are compact (its likeliest tokens and the rest in one number), the
    divergence is the lower bound that `CompactLogits` explains; everything else is exact.
    """

    def __init__(self, ids: Tensor, reference: Tensor | CompactLogits, changed: Tensor) -> None:
        """
        Args:
            ids: int64 [tokens].
            reference: [tokens, vocabulary or features], or the same compact.
            changed: [tokens, vocabulary or features].
        """
        self.ids = ids
        self.changed = changed.float()
        self._compact = reference if isinstance(reference, CompactLogits) else None
        self._dense = None if isinstance(reference, CompactLogits) else reference.float()

    @property
    def reference(self) -> Tensor:
        """The original's output, float32 [tokens, features]; hidden states are never compact."""
        assert self._dense is not None
        return self._dense

    @cached_property
    def log_changed(self) -> Tensor:
        """The changed model's log-probabilities, float32 [tokens, vocabulary]."""
        return self.changed.log_softmax(-1)

    @cached_property
    def _log_reference(self) -> Tensor:
        return self.reference.log_softmax(-1)

    @cached_property
    def divergence(self) -> Tensor:
        """KL(original || changed) of every token, float64 [tokens], in nats."""
        if self._compact is not None:
            return self._compact.divergence(self.log_changed)
        return token_divergence(self._log_reference, self.log_changed)

    @cached_property
    def confidence(self) -> Tensor:
        """Probability of the token that the original finds likeliest, float64 [tokens]."""
        if self._compact is not None:
            return self._compact.log_probabilities[:, 0].double().exp()
        return self._log_reference.amax(-1).double().exp()

    @cached_property
    def same_top1(self) -> Tensor:
        """Whether both find the same token likeliest, bool [tokens]; of a tie the first counts."""
        likeliest = self._compact.indices[:, 0] if self._compact else self.reference.argmax(-1)
        return likeliest == self.changed.argmax(-1)

    @property
    def targets(self) -> Tensor:
        """The tokens that are predicted, int64 [tokens - 1]."""
        return self.ids[1:]

    @cached_property
    def losses(self) -> Tensor:
        """Minus the log-probability of every next token, float64 [tokens - 1], in nats."""
        return _next_token_losses(self.log_changed, self.targets)

    @cached_property
    def reference_losses(self) -> Tensor:
        """The same of the original."""
        if self._compact is not None:
            return -self._compact.next_token[: len(self.targets)].double()
        return _next_token_losses(self._log_reference, self.targets)

    @cached_property
    def cosine(self) -> Tensor:
        """Cosine of the angle between both outputs of every token, float64 [tokens]."""
        return torch.cosine_similarity(self.reference.double(), self.changed.double(), dim=-1)


def _next_token_losses(log_probabilities: Tensor, targets: Tensor) -> Tensor:
    picked = log_probabilities[:-1].gather(-1, targets[:, None].to(log_probabilities.device))
    return -picked.squeeze(-1).double()
