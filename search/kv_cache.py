"""Formats for the key/value cache: what each costs in quality per layer, and the best choice.

What a layer's cache loses is estimated as what a weight loses: the errors dk of a token's keys and dv
of its values change the loss by g_k . dk + g_v . dv, with the gradients g of noise at the logits
whose covariance is that of the model's own distribution, and half the mean square of that is the
second-order estimate of the KL divergence to the original. Correlations between tokens and between
layers are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from autoq.errors import InputError, ModelError
from autoq.formats import NONE, FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.layers.kv_cache import CachedLayer, cache_scale, fake_quantize_cache, watched_cache
from autoq.models import GroupName, ModelMap
from autoq.models.checkpointing import ActivationBudget
from autoq.search._batch_loss import BatchLoss, check_loss, check_not_constant
from autoq.search._scored_product import scoring_mode
from autoq.search._types import CostTable, Plan, SensitivityTable
from autoq.search.solver import plan_from_assignment, solve

CacheScope: TypeAlias = Literal["layer", "model"]
"""Whether every layer may have its own format, or one holds for all."""

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


def choose_cache(
    table: SensitivityTable,
    layers: Sequence[CachedLayer],
    formats: Sequence[FormatName],
    bits: float,
    scope: CacheScope,
) -> Plan:
    """The formats of least predicted loss within a budget; exact.

    Args:
        table: scores of the layers, its groups, in all formats that are offered.
        formats: offered; "none" may be among them.
        bits: mean bits per cached element, block scales counted; more than all take is no limit.
        scope: "model" gives all layers one format, "layer" each its own.
    Returns:
        A plan whose groups are layers and whose weights are elements per token; its bound is among
        choices of the same scope.
    Raises:
        InputError: no choice takes so few bits, a layer can take none of the formats, or with
            "model" no format fits all layers.
        UnknownNameError: a format is not known.
    """
    check_cache_formats(layers, formats, bits, scope)
    costs = _costs(layers, formats)
    table = _columns(table, formats)
    limit = min(bits, max(KV_CACHE_FORMATS[name].bits for name in formats))
    if scope == "layer":
        return solve(table, costs, limit)
    plans = [
        plan_from_assignment(table, costs, {GroupName(layer.name): name for layer in layers})
        for name in dict.fromkeys(formats)
        if KV_CACHE_FORMATS[name].bits <= limit and all(e.misfit(name) is None for e in layers)
    ]
    best = min(plans, key=lambda plan: (plan.predicted_loss, plan.effective_bits))
    return replace(best, budget_bits=bits, bound=best.predicted_loss, gap=0.0)


def check_cache_formats(
    layers: Sequence[CachedLayer], formats: Sequence[FormatName], bits: float, scope: CacheScope
) -> None:
    """Refuse what no scores could make possible; the errors are those of `choose_cache`."""
    quantised = [name for name in formats if KV_CACHE_FORMATS[name].name != NONE]
    if not quantised:
        known = ", ".join(name for name in KV_CACHE_FORMATS if name != NONE)
        raise InputError(
            f"--kv-formats must name at least one quantised format, got {', '.join(formats) or 'none'}; "
            f"known: {known}"
        )
    for layer in layers:
        if all(layer.misfit(name) is not None for name in formats):
            raise InputError(f"{layer.misfit(quantised[0])}; offer fp8, or none, in --kv-formats")
    fitting = [name for name in formats if all(layer.misfit(name) is None for layer in layers)]
    if scope == "model" and not fitting:
        raise InputError(
            f"no format of {', '.join(formats)} fits the cache of all layers; offer fp8, or search "
            "with --kv-scope layer"
        )
    least = _least_bits(layers, formats if scope == "layer" else fitting, scope)
    if not bits >= least:
        raise InputError(
            f"--kv-bits must be at least {least:g} for a cache in {', '.join(formats)}, got {bits:g}; "
            "raise it, or offer a smaller format"
        )


def _least_bits(
    layers: Sequence[CachedLayer], formats: Sequence[FormatName], scope: CacheScope
) -> float:
    if scope == "model":
        return min(KV_CACHE_FORMATS[name].bits for name in formats)
    total = sum(
        layer.elements
        * min(KV_CACHE_FORMATS[name].bits for name in formats if layer.misfit(name) is None)
        for layer in layers
    )
    return total / sum(layer.elements for layer in layers)


def _columns(table: SensitivityTable, formats: Sequence[FormatName]) -> SensitivityTable:
    kept = [name for name in table.formats if name in formats]
    columns = [table.formats.index(name) for name in kept]
    return replace(table, formats=tuple(kept), contributions=table.contributions[:, :, columns])


def _costs(layers: Sequence[CachedLayer], formats: Sequence[FormatName]) -> CostTable:
    """Layers x formats -> bits per token."""
    offered = (*(name for name in KV_CACHE_FORMATS if name != NONE and name in formats), NONE)
    bits: Mapping[FormatName, float] = {
        name: KV_CACHE_FORMATS[name].bits for name in map(FormatName, offered)
    }
    # Blocks are of sixteen, so half bits never come alone.
    cells = np.array(
        [[round(layer.elements * value) for value in bits.values()] for layer in layers],
        dtype=np.int64,
    )
    return CostTable(
        groups=tuple(GroupName(layer.name) for layer in layers),
        formats=tuple(bits),
        weights=np.array([layer.elements for layer in layers], dtype=np.int64),
        effective_bits=cells,
        stored_bits=cells,
        peer_bits=cells.astype(np.float64),
        allowed=np.array(
            [[name in formats and e.misfit(name) is None for name in bits] for e in layers]
        ),
    )
