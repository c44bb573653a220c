"""Logits in little room: the likeliest tokens, and the rest as one number."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class CompactLogits:
    """A model's distributions over the next token, reduced to their K likeliest tokens.

    All other tokens count as one with the probability that is left. Divergence from a distribution
    that is reduced the same way is a lower bound of the true divergence, because merging outcomes
    never raises it (the log-sum inequality; Cover and Thomas, Elements of Information Theory,
    section 2.7). It is exact where K is the whole vocabulary. Probabilities of likeliest and of
    next tokens are exact for every K.
    """

    indices: Tensor  # int32 [..., tokens, K], by falling probability
    log_probabilities: Tensor  # float32 [..., tokens, K]
    log_rest: Tensor  # float32 [..., tokens]: of all other tokens together; -inf if there are none
    next_token: (
        Tensor  # float32 [..., tokens]: log-probability of the token that follows; last is 0
    )

    @classmethod
    def reduce(cls, logits: Tensor, ids: Tensor, kept: int) -> CompactLogits:
        """Reduce logits [..., tokens, vocabulary] for the tokens ids [..., tokens].

        Args:
            kept: K; no more than the vocabulary is kept.
        """
        log_probabilities = logits.float().log_softmax(-1)
        indices = log_probabilities.topk(min(kept, logits.shape[-1]), dim=-1).indices
        _put_first(indices, logits.argmax(-1))
        others = log_probabilities.double().scatter(-1, indices, -torch.inf)
        follows = torch.zeros(logits.shape[:-1], dtype=torch.float32, device=logits.device)
        targets = ids[..., 1:, None].to(logits.device)
        follows[..., :-1] = log_probabilities[..., :-1, :].gather(-1, targets).squeeze(-1)
        return cls(
            indices.to(torch.int32),
            log_probabilities.gather(-1, indices),
            others.logsumexp(-1).float(),
            follows,
        )

    @property
    def is_exact(self) -> bool:
        """Whether nothing was left out, so that divergences are exact."""
        return bool((self.log_rest == -torch.inf).all())

    def __getitem__(self, row: int) -> CompactLogits:
        """One sequence of a batch."""
        return CompactLogits(
            self.indices[row], self.log_probabilities[row], self.log_rest[row], self.next_token[row]
        )

    def divergence(self, log_changed: Tensor) -> Tensor:
        """A lower bound of KL(this || changed) of every token, float64 [tokens], in nats.

        Args:
            log_changed: the other model's log-probabilities, float32 [tokens, vocabulary].
        """
        indices = self.indices.long()
        log_other = log_changed.gather(-1, indices)
        kept = self.log_probabilities.exp() * (self.log_probabilities - log_other)
        found = kept.sum(-1).double()
        if self.is_exact:
            return found
        others = log_changed.double().scatter(-1, indices, -torch.inf).logsumexp(-1)
        rest = self.log_rest.double()
        share = rest.exp() * (rest - others)
        return found + torch.where(rest == -torch.inf, torch.zeros_like(share), share)


def _put_first(indices: Tensor, likeliest: Tensor) -> None:
    """Put the token that `argmax` finds first; `topk` orders equal logits as it likes."""
    place = (indices == likeliest[..., None]).int().argmax(-1, keepdim=True)
    indices.scatter_(-1, place, indices[..., :1].clone())
    indices[..., 0] = likeliest


def bytes_per_token(kept: int) -> int:
    """What one token's compact logits take: index and log-probability of each, and two numbers."""
    return 8 * kept + 8
