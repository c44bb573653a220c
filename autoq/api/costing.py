"""What a study's groups cost: bits, bytes on disk, bits that a token touches, time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from autoq.api.budgets import Budgets
from autoq.errors import InputError
from autoq.formats import FormatName
from autoq.models import ModelMap, SlotName
from autoq.models.grouping import is_expert
from autoq.search import CostTable, Resource, apply_rules, build_cost_table, parse_rule
from autoq.search.costs import (
    StoredSizes,
    check_budgets,
    token_shares,
    with_active_bits,
    with_latency,
    with_stored_sizes,
)
from autoq.search.kernel_times import KernelTimes
from autoq.search.latency import latency_seconds, products_of

if TYPE_CHECKING:
    from autoq.api.config import ScoringConfig
    from autoq.api.study_tables import StudyTables
    from autoq.api.task import LoadedModel

SIZES = "sizes"
"""The stage of a study that counts what its container writes, by name in the store."""

TokenShares = Mapping[SlotName, float]


def constrained_costs(
    model_map: ModelMap,
    formats: Sequence[FormatName],
    rules: Sequence[str],
    unusable: Mapping[tuple[Any, Any], str],
) -> CostTable:
    """Costs of every group in every format, with what is not allowed marked.

    Args:
        rules: the user's, "pattern=format[,format]".
        unusable: group and format -> why the container cannot hold it.
    """
    costs = build_cost_table(model_map, formats)
    allowed = costs.allowed.copy()
    for row, group in enumerate(costs.groups):
        for column, fmt in enumerate(costs.formats):
            allowed[row, column] &= (group, fmt) not in unusable
    parsed = [parse_rule(rule) for rule in rules]
    return apply_rules(replace(costs, allowed=allowed), model_map, parsed)


def study_costs(
    study: StudyTables, costs: CostTable, budgets: Budgets, *, needed: Iterable[Resource] = ()
) -> CostTable:
    """`costs` with every resource that the study knows the cells of.

    Args:
        budgets: say on which hardware time is predicted, if on any.
        needed: resources that are limited.
    Raises:
        InputError: the study was made by a version that did not store what a needed resource is
            counted from.
    """
    sizes, shares = study.stored_sizes, study.token_shares
    if sizes is not None:
        costs = with_stored_sizes(costs, sizes)
    if shares is not None:
        costs = with_active_bits(costs, study.model_map, shares)
        costs = _with_time(costs, study.model_map, budgets, shares)
    refuse_uncounted(study.name, costs, needed)
    return costs


def refuse_uncounted(study: str, costs: CostTable, needed: Iterable[Resource]) -> None:
    """
    Raises:
        InputError: the study was made by a version that did not store what a needed resource is
            counted from.
    """
    known = {Resource.EFFECTIVE_BITS, *costs.additional, *costs.fixed}
    lacking = [resource for resource in needed if resource not in known]
    if lacking:
        raise InputError(
            f"study {study} was made by an earlier version of autoq and does not know what "
            f"its layers take in {lacking[0].value}; run the search again into another store"
        )


def check_reachable(
    loaded: LoadedModel,
    model_map: ModelMap,
    config: ScoringConfig,
    costs: CostTable,
    budgets: Budgets,
) -> None:
    """Refuse budgets that no plan can meet, before any pass over data.

    What depends on the routing of tokens to experts is not known yet, and is not refused here.

    Raises:
        BudgetInfeasibleError: effective bits are out of reach.
        ResourceInfeasibleError: another resource is.
    """
    limits = list(budgets.limits)
    if Resource.STORED_BYTES in {budget.resource for budget in limits}:
        costs = with_stored_sizes(costs, sizes_of(loaded, model_map, config, {}))
    if any(is_expert(slot) for slot in model_map.slots.values()):
        routed = (Resource.ACTIVE_BITS, Resource.LATENCY)
        limits = [budget for budget in limits if budget.resource not in routed]
    else:
        shares = dict.fromkeys(model_map.slots, 1.0)
        costs = with_active_bits(costs, model_map, shares)
        costs = _with_time(costs, model_map, budgets, shares)
    check_budgets(costs, limits)


def sizes_of(
    loaded: LoadedModel, model_map: ModelMap, config: ScoringConfig, calibration: Mapping[Any, Any]
) -> StoredSizes:
    """What the configured container writes for the model."""
    from autoq.export import stored_sizes  # loads torch, which studies are read without

    return stored_sizes(
        loaded.model,
        model_map,
        config.formats,
        container=config.container,
        scale_dtype=loaded.storage_dtype,
        source=loaded.path,
        calibration=calibration,
    )


def sizes_to_plain(sizes: StoredSizes) -> dict[str, Any]:
    """Plain data; `sizes_from_plain` gives the sizes back."""
    cells = {group: dict(bits) for group, bits in sizes.cells.items()}
    return {"bits": cells, "fixed_bytes": sizes.fixed_bytes}


def sizes_from_plain(data: Mapping[str, Any]) -> StoredSizes:
    """The sizes that `sizes_to_plain` was given."""
    return StoredSizes(cells=data["bits"], fixed_bytes=data["fixed_bytes"])


def shares_from(model_map: ModelMap, calibrated: Mapping[str, Any]) -> TokenShares | None:
    """How many of the tokens each slot sees; None where calibration did not count them.

    Args:
        calibrated: the payload of the calibration stage.
    """
    experts = {name for name, slot in model_map.slots.items() if is_expert(slot)}
    rows = {
        record["slot"]: record["input_rows"]
        for record in calibrated["records"]
        if record.get("input_rows") is not None
    }
    if not experts:
        return token_shares(model_map, {}, 1)
    if "tokens" not in calibrated or not experts <= rows.keys():
        return None
    return token_shares(model_map, rows, calibrated["tokens"])


def latency_note(budgets: Budgets, model_map: ModelMap) -> str | None:
    """What to say of a latency table that does not hold every shape of the model."""
    model = budgets.latency
    if not isinstance(model, KernelTimes):
        return None
    shapes = products_of(model_map)
    lacking = model.unmeasured(shapes)
    if not lacking:
        return None
    rows, columns = lacking[0]
    return (
        f"the latency table of {model.hardware} has {len(shapes) - len(lacking)} of the "
        f"{len(shapes)} shapes of this model; the others, such as {rows} x {columns}, take the time "
        "of the nearest one in proportion to their weights"
    )


def _with_time(
    costs: CostTable, model_map: ModelMap, budgets: Budgets, shares: TokenShares
) -> CostTable:
    if budgets.latency is None:
        return costs
    seconds = latency_seconds(
        model_map, costs.formats, budgets.latency, tokens=budgets.latency_tokens, shares=shares
    )
    return with_latency(costs, seconds)
