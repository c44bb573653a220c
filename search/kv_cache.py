"""Formats for the key/value cache: what each costs in quality per layer.

What a layer's cache loses is estimated as what a weight loses: the errors dk of a token's keys and dv
of its values change the loss by g_k . dk + g_v . dv, with the gradients g of noise at the logits
whose covariance is that of the model's own distribution, and half the mean square of that is the
second-order estimate of the KL divergence to the original. Correlations between tokens and between
layers are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import ModelError
from autoq.formats import NONE, FormatName
from autoq.layers.cached_layer import CachedLayer
from autoq.layers.kv_cache import cache_scale, fake_quantize_cache, watched_cache
from autoq.models import ModelMap
from autoq.models.checkpointing import ActivationBudget
from autoq.search._batch_loss import BatchLoss, check_loss, check_not_constant
from autoq.search._scored_product import scoring_mode

_KEPT_ACTIVATION_BYTES = 64 << 20  # as for the scores of weights

_Observer: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], None]


class CacheScorer:
    """Scores every layer's cache in every format, batch by batch, from gradients."""

    def __init__(
        self,
        model: nn.Module,
        model_map: ModelMap,
        layers: Sequence[CachedLayer],
        formats: Sequence[FormatName],
    ) -> None:
        """
        Args:
            layers: with the magnitudes that calibration found.
            formats: columns of the result; "none" is dropped.
        """
        self.formats = tuple(name for name in formats if name != NONE)
        self._model, self._map = model, model_map
        self._layers = {layer.name: layer for layer in layers}
        self._activations = ActivationBudget(_KEPT_ACTIVATION_BYTES)
        self._squares: dict[str, Tensor] = {}

    def score_batch(self, loss: Callable[[], BatchLoss]) -> NDArray[np.float64]:
        """Contributions of one batch.

        Args:
            loss: runs the model and returns the summed loss, with its graph.
        Returns:
            float64 [sequences, layers, formats], nats per token where the loss is the noise of
            `fisher_noise_loss`; NaN where a layer cannot take a format.
        Raises:
            ModelError: the loss or a gradient is not finite, or the loss is constant.
        """
        self._squares = {}
        # The products of weights need no look here: no slot is tapped.
        nothing = replace(self._map, slots={})
        with (
            watched_cache(self._model, self._layers, self._shown),
            scoring_mode(self._model, nothing, _no_handler, self._activations),
        ):
            batch = loss()
            check_loss(batch)
            batch.total.backward()  # type: ignore[no-untyped-call]
        check_not_constant(any(bool(found.nan_to_num().any()) for found in self._squares.values()))
        rows = [self._squares[name] for name in self._layers]
        result = torch.stack(rows, dim=1).mul_(0.5 / batch.tokens_per_sequence)
        return result.numpy(force=True)

    def _shown(self, name: str, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        # Parameters are frozen: what has no gradient before it starts a graph of its own.
        keys, values = (
            cached if cached.requires_grad else cached.detach().requires_grad_()
            for cached in (keys, values)
        )

        def observe(*tensors: Tensor) -> None:
            self._squares[name] = self._projected(self._layers[name], *tensors)

        shown: tuple[Tensor, Tensor] = _ShownCache.apply(  # type: ignore[no-untyped-call]
            keys, values, observe
        )
        return shown

    def _projected(
        self,
        layer: CachedLayer,
        keys: Tensor,
        values: Tensor,
        key_gradient: Tensor,
        value_gradient: Tensor,
    ) -> Tensor:
        """Sums over tokens of squared projections, float64 [sequences, formats]."""
        columns = []
        for fmt in self.formats:
            if layer.misfit(fmt) is not None:
                columns.append(torch.full((keys.shape[0],), torch.nan, dtype=torch.float64))
                continue
            change = _projection(keys, key_gradient, fmt, layer.key_amax)
            change += _projection(values, value_gradient, fmt, layer.value_amax)
            columns.append(change.double().square().sum(dim=1).cpu())
            if not bool(torch.isfinite(columns[-1]).all()):
                raise ModelError(
                    f"a gradient at the cache of {layer.name} is NaN or Inf on calibration data; run "
                    "the model in a wider dtype (--dtype float32)"
                )
        return torch.stack(columns, dim=1)


def _projection(cached: Tensor, gradient: Tensor, fmt: FormatName, amax: float) -> Tensor:
    """g . (quantised - exact), summed over heads and their elements, float32 [sequences, tokens]."""
    exact = cached.float()
    error = fake_quantize_cache(exact, fmt, cache_scale(fmt, amax)).sub_(exact)
    return error.mul_(gradient.float()).sum(dim=(1, 3))


class _ShownCache(torch.autograd.Function):
    """Keys and values as they are; backward shows them, and the gradients there, to an observer."""

    @staticmethod
    def forward(
        ctx: Any, keys: Tensor, values: Tensor, observe: _Observer
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(keys, values)
        ctx.observe = observe
        return keys.view_as(keys), values.view_as(values)

    @staticmethod
    def backward(
        ctx: Any, key_gradient: Tensor, value_gradient: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        ctx.observe(*ctx.saved_tensors, key_gradient, value_gradient)
        return key_gradient, value_gradient, None


def _no_handler(*_: Any) -> Tensor:
    raise AssertionError("no slot is tapped")
