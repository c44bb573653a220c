"""The best formats for the key/value cache, from the scores of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np

from autoq.errors import InputError
from autoq.formats import NONE, FormatName
from autoq.formats.kv_cache import KV_CACHE_FORMATS
from autoq.layers.cached_layer import CachedLayer
from autoq.models import GroupName
from autoq.search._types import CostTable, Plan, SensitivityTable
from autoq.search.solver import plan_from_assignment, solve

CacheScope: TypeAlias = Literal["layer", "model"]
"""Whether every layer may have its own format, or one holds for all."""


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
