"""Which tokens a layer's formats are projected on: those that its score is made of.

Most tokens of a language model say next to nothing of a layer: the model is sure of what follows
them, or their gradient is small. So a layer's rows are sampled with probabilities that grow with
the size of what they can contribute, and what is sampled counts in inverse proportion (Horvitz and
Thompson, "A generalization of sampling without replacement from a finite universe", 1952): the
scores keep their expectation, and how much variance that adds is chosen, not how many rows are
taken.
"""

from __future__ import annotations

import torch
from torch import Tensor

ADDED_VARIANCE = 0.02
"""Share of its second moment over the tokens that sampling may add to a score's variance, as far
as `importance` knows contributions. Measured over 64 sequences of the bundled model and its variant
with outliers, with the scores' standard errors from their sequences: a quarter of the tokens is
taken, standard errors grow by 0.4 % in the median and by 20 % at the worst of 72 cells."""

SMALLEST_PROBABILITY = 1 / 8
"""What `importance` does not see coming counts eight times at most."""

_SIZES = 8
"""How many numbers of rows there can be."""


def importance(inputs: Tensor, output_gradient: Tensor) -> Tensor:
    """How much a row can contribute to a layer's scores, on no scale.

    An error that is relative to its input contributes as |g|^2 |x|^2, one that is the same for all
    rows, as that of a scale for the whole tensor, as |g|^2. Neither may be forgotten: rows of
    extreme inputs would hide all others.

    Args:
        inputs: x, [rows, in_features].
        output_gradient: g, [rows, out_features].
    Returns:
        float64 [rows]; the mean of the two, each divided by its mean over the rows.
    """
    gradient = _square_norms(output_gradient)
    both = gradient * _square_norms(inputs)
    return (gradient / gradient.mean() + both / both.mean()) / 2


def _square_norms(rows: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
    return norms.double().square_()


def inclusion_probabilities(
    size: Tensor,
    added_variance: float = ADDED_VARIANCE,
    smallest: float = SMALLEST_PROBABILITY,
) -> Tensor:
    """The fewest rows, on average, that add no more than a share of variance.

    With probabilities p and contributions of size w the sum of w / p over what is sampled has the
    variance sum w^2 (1 / p - 1). Under a bound on the mean number of rows that is least for
    p = min(1, w / t), where it is the sum of w (t - w) over the rows with w < t: it grows with t,
    and t is chosen such that it is `added_variance` times the sum of w^2.

    Args:
        size: w, float64 [rows], not negative.
        added_variance: 0 takes all rows.
        smallest: no probability is below.
    Returns:
        float64 [rows]; ones where a size is not finite, or all are 0.
    """
    ordered = size.sort().values
    first, second = ordered.cumsum(0), ordered.square().cumsum(0)
    bound = added_variance * second[-1:]
    if not 0 < float(bound) < torch.inf:  # NaN, too
        return torch.ones_like(size)
    # What is added where t is the k-th smallest size; between two of them it is linear in t.
    added = ordered * first - second
    below = torch.searchsorted(added, bound, right=True).sub_(1)
    threshold = (bound + second[below]) / first[below]
    return (size / threshold).clamp_(smallest, 1.0)


def sampled_rows(probability: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Which rows to take, and what their projections are multiplied by before they are squared.

    A few more rows are taken than are sampled, with a factor of 0, so that their number is a
    multiple of an eighth of all: buffers then come in few sizes. In as many as there are products
    glibc's heap would not use them again (before 2.38): 20 MB more with every batch, measured.

    Args:
        probability: of each row, float64 [rows].
        uniform: random numbers in [0, 1), float64 [rows]; a row is sampled where it is smaller.
    Returns:
        int64 [taken], ascending, and float32 [taken].
    """
    step = -(-len(probability) // _SIZES)
    sampled = int((uniform < probability).sum())
    count = min(len(probability), -(-sampled // step) * step)
    rows = (uniform - probability).argsort(stable=True)[:count].sort().values
    weights = probability[rows].rsqrt()
    return rows, weights.mul_(uniform[rows] < probability[rows]).float()
