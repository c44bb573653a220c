"""Losses to score with: most need no labels, and measure a model against its own distribution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoq.models.forward import OutputKind

_LARGEST_DOT = 2**31 - 1
"""Elements; torch.dot refuses more on GPUs: 14,000 tokens of a vocabulary of 150,000."""


def own_distribution_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Summed cross entropy to labels drawn from the model itself.

    Its gradients average to the Fisher matrix of the model's output distribution, which is the
    second derivative of the KL divergence to the original. (Martens, "New insights and
    perspectives on the natural gradient method", 2020, section 9.)

    Args:
        logits: [..., vocabulary].
        generator: on the CPU; makes the draw repeatable.
    Returns:
        scalar, in nats.
    """
    flat = logits.flatten(0, -2).float()
    with torch.no_grad():
        uniform = torch.rand(flat.shape[0], generator=generator).to(flat.device)
        cumulative = flat.softmax(dim=-1).cumsum(dim=-1)
        labels = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).flatten()
        labels.clamp_(max=flat.shape[-1] - 1)
    return nn.functional.cross_entropy(flat, labels, reduction="sum")


def fisher_noise_loss(logits: Tensor, generator: torch.Generator) -> Tensor:
    """A linear function of the logits, whose gradients average to the Fisher matrix, too.

    With p the model's distribution at a token and e random signs, the gradient is

        u = sqrt(p) e - p sum(sqrt(p) e),    E[u u^T] = diag(p) - p p^T,

    as that of the loss with labels drawn from p. But where the model is sure of the next token, a
    drawn label gives nearly nothing nearly always, and very much now and then. Squares of
    projections on u have a variance below twice their squared mean whatever p is, so far fewer
    tokens say the same.

    Args:
        logits: [..., vocabulary].
        generator: on the device of the logits; makes the signs repeatable.
    Returns:
        scalar; of no meaning but for its gradient.
    """
    flat = logits.flatten(0, -2).float()
    with torch.no_grad():
        root = flat.softmax(dim=-1).sqrt_()
        direction = _random_signs(root, generator).mul_(root)
        direction.sub_(root.square_().mul_(direction.sum(dim=-1, keepdim=True)))
    return _inner_product(flat, direction)


def _inner_product(first: Tensor, second: Tensor) -> Tensor:
    if first.numel() > _LARGEST_DOT:
        return (first * second).sum()
    return torch.dot(first.flatten(), second.flatten())


def _random_signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """-1 and 1, float32, as many as `like` has values and in its shape.

    Eight come from every random byte: a draw for each sign takes as long as all else of the loss.
    """
    places = torch.arange(8, device=like.device)
    bytes_to_signs = torch.arange(256, device=like.device)[:, None].bitwise_right_shift(places)
    bytes_to_signs = bytes_to_signs.bitwise_and_(1).mul_(2).sub_(1).float()
    drawn = torch.empty(-(-like.numel() // 8), dtype=torch.uint8, device=like.device)
    drawn.random_(generator=generator)
    return bytes_to_signs.index_select(0, drawn.int()).flatten()[: like.numel()].view_as(like)


def own_output_loss(hidden: Tensor, generator: torch.Generator) -> Tensor:
    """The same for models without a vocabulary: outputs seen as the mean of a unit Gaussian.

    Half the expected square of its directional derivative is half the squared output error.

    Args:
        hidden: [..., features].
    """
    noise = torch.randn(hidden.shape, generator=generator).to(hidden.device, hidden.dtype)
    return (hidden * noise).sum()


def next_token_loss(logits: Tensor, ids: Tensor, *, shift: bool) -> Tensor:
    """Summed cross entropy to the tokens of the data.

    Args:
        logits: [sequences, tokens, vocabulary].
        ids: int64 [sequences, tokens].
        shift: position t predicts token t + 1, as in causal models; otherwise token t.
    Returns:
        scalar, in nats.
    """
    if shift:
        logits, ids = logits[:, :-1], ids[:, 1:]
    return nn.functional.cross_entropy(
        logits.flatten(0, -2).float(), ids.flatten(), reduction="sum"
    )


def divergence_of(kind: OutputKind) -> Callable[[Tensor, Tensor], Tensor]:
    """KL(original || changed) of two outputs, per token in nats, [...] of [..., features].

    Tokens that the original rules out by logits of -inf count nothing; one that the changed output
    alone rules out makes it infinite. Outputs without a vocabulary are seen as means of unit
    Gaussians. Gradients flow to the changed output, and double precision is not needed: nothing
    cancels but what is rounding anyway.
    """
    return _divergence_of_logits if kind == "logits" else _divergence_of_gaussians


def _divergence_of_logits(original: Tensor, changed: Tensor) -> Tensor:
    before, after = original.float().log_softmax(-1), changed.float().log_softmax(-1)
    terms = before.exp() * (before - after)
    return terms.masked_fill(before == -torch.inf, 0.0).sum(dim=-1)


def _divergence_of_gaussians(original: Tensor, changed: Tensor) -> Tensor:
    return 0.5 * (original.float() - changed.float()).square().sum(dim=-1)
