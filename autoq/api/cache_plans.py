"""What a study's store has of its key/value cache: scores, wishes and the choice with every plan.

A plan with a cache is the plan of the weights with the choice in its details; predicted losses add up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.layers.cached_layer import CachedLayer
from autoq.models import GroupName
from autoq.search import Plan, SensitivityTable
from autoq.search.cache_choice import CacheScope, choose_cache
from autoq.search.estimator_names import DEFAULT_ESTIMATOR
from autoq.studies import PlanRecord, WorkStatus

if TYPE_CHECKING:
    from autoq.api.study_tables import StudyTables

KV_CACHE = "kv_cache"
"""The stage of a study that scores the cache, and the key of the choice in a plan's details."""

DEFAULT_BITS = 8.0
_NATS = "nats_per_token"
_OF_THE_SOLVER = ("budgets", "takes", "least")  # details that a `Plan` has as fields of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheWish:
    """What the cache may be, as users say it."""

    formats: tuple[FormatName, ...]  # offered, "none" possibly among them
    bits: float = DEFAULT_BITS  # budget: mean per cached element, block scales counted
    scope: CacheScope = "model"

    def label(self) -> str:
        """What a plan's label says of it."""
        each = " per layer" if self.scope == "layer" else ""
        return f"KV cache of {','.join(self.formats)} at {self.bits:g} bits{each}"

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> CacheWish:
        """The value that `to_json` came from."""
        return cls(**{**data, "formats": tuple(data["formats"])})


def stored_layers(study: StudyTables) -> tuple[CachedLayer, ...]:
    """The layers that cache, with their calibrated magnitudes; empty where none was looked for."""
    found = study.store.stage(study.id, KV_CACHE)
    if found is None or found.status is not WorkStatus.DONE:
        return ()
    return tuple(CachedLayer(**entry) for entry in found.payload["layers"])


def _scores(study: StudyTables, layers: Sequence[CachedLayer]) -> SensitivityTable:
    stage = study.store.stage(study.id, KV_CACHE)
    assert stage is not None  # there are layers
    return SensitivityTable(
        groups=tuple(GroupName(layer.name) for layer in layers),
        formats=tuple(FormatName(name) for name in stage.payload["formats"]),
        contributions=study.store.arrays(study.id, KV_CACHE)["contributions"],
        unit=_NATS,
        estimator=DEFAULT_ESTIMATOR,
    )


def with_cache(study: StudyTables, plan: PlanRecord, wish: CacheWish) -> PlanRecord:
    """The plan of weights with the best cache that the wish allows, stored.

    Raises:
        InputError: the study's cache was not scored, or the wish cannot be met.
    """
    whole, chosen = plan_with_cache(study, plan.to_plan(), wish)
    details = {
        **{key: value for key, value in plan.details.items() if key not in _OF_THE_SOLVER},
        KV_CACHE: {"of_plan": plan.id, **chosen},
    }
    label = label_with_cache(plan.label, wish)
    return study.store.plan(study.store.add_plan(study.id, whole, label=label, details=details))


def label_with_cache(label: str, wish: CacheWish) -> str:
    """What a plan of weights with this label is called with a cache."""
    return f"{label}, {wish.label()}"


def plan_with_cache(study: StudyTables, plan: Plan, wish: CacheWish) -> tuple[Plan, dict[str, Any]]:
    """The plan of weights with the losses of the best cache, and what was chosen, as plain data.

    Raises:
        InputError: the study's cache was not scored, or the wish cannot be met.
    """
    layers = stored_layers(study)
    if not layers:
        raise InputError(
            f"study {study.name} has no scores of the key/value cache; search again with --kv-formats"
        )
    chosen = choose_cache(_scores(study, layers), layers, wish.formats, wish.bits, wish.scope)
    if study.sensitivity.unit == _NATS:
        plan = _added(plan, chosen)
    elements = sum(layer.elements for layer in layers)
    return plan, {
        "formats": dict(chosen.assignment),
        "wish": wish.to_json(),
        "bits": chosen.effective_bits,
        "bytes_per_token": chosen.effective_bits * elements / 8,
        "predicted_loss": chosen.predicted_loss,
        "predicted_loss_interval": list(chosen.predicted_loss_interval),
        "gap": chosen.gap,
    }


def _added(plan: Plan, cache: Plan) -> Plan:
    """Both losses; ends of intervals are added, too, which makes them no narrower than they are."""
    low, high = plan.predicted_loss_interval
    loss, bound = plan.predicted_loss + cache.predicted_loss, plan.bound + cache.bound
    return replace(
        plan,
        predicted_loss=loss,
        predicted_loss_interval=(
            low + cache.predicted_loss_interval[0],
            high + cache.predicted_loss_interval[1],
        ),
        bound=bound,
        gap=(loss - bound) / loss if loss > 0.0 else 0.0,
    )


def cache_formats(plan: PlanRecord) -> dict[str, FormatName]:
    """Layer -> format of the plan's cache; empty where it has no say in that."""
    found = plan.details.get(KV_CACHE)
    return {} if found is None else {k: FormatName(v) for k, v in found["formats"].items()}


def plan_of_weights(study: StudyTables, plan: PlanRecord) -> PlanRecord:
    """The plan without its cache, which is another plan of the study; itself if it has none."""
    found = plan.details.get(KV_CACHE)
    return plan if found is None else study.store.plan(found["of_plan"])


def wish_of(plan: PlanRecord) -> CacheWish | None:
    """What the plan's cache was chosen by; None where it has none."""
    found = plan.details.get(KV_CACHE)
    return None if found is None else CacheWish.from_json(found["wish"])


def cache_summary(study: StudyTables, plan: PlanRecord) -> dict[str, Any] | None:
    """The plan's cache as plain data, with every layer's scores; None where it has none."""
    found = plan.details.get(KV_CACHE)
    if found is None:
        return None
    layers = stored_layers(study)
    table = _scores(study, layers)
    scores, errors = table.scores(), table.standard_errors()
    rows = [
        {
            "name": layer.name,
            "format": found["formats"][layer.name],
            "elements": layer.elements,
            "key_amax": layer.key_amax,
            "value_amax": layer.value_amax,
            "scores": _by_format(table, scores[row]),
            "standard_errors": _by_format(table, errors[row]),
        }
        for row, layer in enumerate(layers)
    ]
    wish = wish_of(plan)
    assert wish is not None  # the plan has a cache
    own = ("bits", "bytes_per_token", "predicted_loss", "predicted_loss_interval", "gap")
    return {
        **{key: found[key] for key in own},
        "budget": wish.bits,
        "scope": wish.scope,
        "offered": list(wish.formats),
        "layers": rows,
    }


def _by_format(table: SensitivityTable, values: Any) -> dict[str, float | None]:
    pairs = zip(table.formats, values, strict=True)
    return {fmt: float(value) if np.isfinite(value) else None for fmt, value in pairs}
