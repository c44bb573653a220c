"""A finished study of a model that nobody has: for tests and benchmarks of what reads studies.

Everything is written into the store as a search would have written it, so the study is opened,
solved, shown and reported like any other; measuring and exporting it need the model, which there
is not. Neither torch nor a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.api._model_map_json import model_map_to_json
from autoq.formats import FORMATS, NONE, FormatName
from autoq.models import (
    DecisionGroup,
    ExcludedSlot,
    GroupName,
    ModelMap,
    SlotKind,
    SlotName,
    WeightSlot,
)
from autoq.search import CostTable, Resource, SensitivityTable, build_cost_table, solve
from autoq.search.costs import StoredSizes, with_active_bits, with_stored_sizes
from autoq.search.estimator_names import DEFAULT_ESTIMATOR
from autoq.studies import SensitivityCell, StudyRecord, StudyStore, WorkStatus, study_key

_HIDDEN, _KEYS, _INNER, _VOCABULARY = 1024, 256, 2816, 32_000
_BITS = 4.8
_STAGE_SECONDS = {"discovery": 0.4, "calibration": 42.0, "sizes": 0.1, "sensitivity": 128.0}
_PEAK_BYTES = 3_221_225_472
_TOKENS_PER_SEQUENCE = 512

# Of a block: its group, the group's slots as (name, rows, columns), and why they belong together.
_ATTENTION = "engines fuse them into one matrix"
_ALONE = "decided alone"
_KINDS: tuple[tuple[str, tuple[tuple[str, int, int], ...], str], ...] = (
    (
        "self_attn.qkv",
        (("q_proj", _HIDDEN, _HIDDEN), ("k_proj", _KEYS, _HIDDEN), ("v_proj", _KEYS, _HIDDEN)),
        _ATTENTION,
    ),
    ("self_attn.o_proj", (("o_proj", _HIDDEN, _HIDDEN),), _ALONE),
    (
        "mlp.gate_up",
        (("gate_proj", _INNER, _HIDDEN), ("up_proj", _INNER, _HIDDEN)),
        _ATTENTION,
    ),
    ("mlp.down_proj", (("down_proj", _HIDDEN, _INNER),), _ALONE),
)
_SENSITIVITY_OF_KIND = (1.0, 0.35, 0.8, 1.6)


def add_synthetic_study(
    store: StudyStore,
    *,
    groups: int = 1000,
    formats: int = 12,
    sequences: int = 8,
    seed: int = 0,
    name: str | None = None,
) -> StudyRecord:
    """Write a finished study: every stage, a plan for 4.8 bits, measurements and one export.

    Args:
        groups: decision groups, four to a layer.
        formats: number formats, the first so many registered ones of those that are no `none`.
        sequences: rows of the table that scores are the means of.
        seed: of the scores; equal arguments write equal numbers.
        name: of the study; None is "synthetic-GROUPS-SEED".
    Raises:
        ValueError: a count is below 1, or there are not so many formats.
        InputError: the store has a study of that name.
    """
    offered = [FormatName(key) for key in FORMATS if key != NONE][:formats]
    if min(groups, formats, sequences) < 1 or len(offered) < formats:
        raise ValueError(
            f"groups, formats and sequences must be >= 1 and formats at most {len(FORMATS) - 1}, got "
            f"{groups}, {formats} and {sequences}"
        )
    title = name or f"synthetic-{groups}-{seed}"
    model_map = _model_map(groups)
    table = _scores(model_map, offered, sequences, seed)
    record = _create(store, title, offered, seed, sequences)
    _store_discovery(store, record.id, model_map)
    _store_scores(store, record.id, table)
    plan_id = _store_plan(store, record.id, table, model_map, offered)
    _store_measurements(store, record.id, plan_id, table, seed)
    _store_export(store, record.id, plan_id)
    store.set_status(record.id, WorkStatus.DONE)
    return store.study(record.id)


def _model_map(groups: int) -> ModelMap:
    slots: dict[SlotName, WeightSlot] = {}
    found: list[DecisionGroup] = []
    for index in range(groups):
        layer, kind = divmod(index, len(_KINDS))
        block = f"model.layers.{layer}"
        group, members, reason = _KINDS[kind]
        parent = group.partition(".")[0]
        names = tuple(SlotName(f"{block}.{parent}.{member}") for member, _, _ in members)
        for slot, (_, rows, columns) in zip(names, members, strict=True):
            slots[slot] = WeightSlot(
                name=slot,
                module=slot,
                parameter="weight",
                kind=SlotKind.LINEAR,
                out_features=rows,
                in_features=columns,
            )
        sets = (names,) if len(names) > 1 else ()
        found.append(
            DecisionGroup(
                name=GroupName(f"{block}.{group}"), slots=names, reason=reason, fusion_sets=sets
            )
        )
    layers = math.ceil(groups / len(_KINDS))
    head = ExcludedSlot(
        name=SlotName("lm_head"), reason="the output head", weights=_VOCABULARY * _HIDDEN
    )
    return ModelMap(
        architecture="SyntheticForCausalLM",
        slots=slots,
        groups=tuple(found),
        excluded=(head,),
        blocks=tuple(f"model.layers.{layer}" for layer in range(layers)),
    )


def _scores(
    model_map: ModelMap, formats: Sequence[FormatName], sequences: int, seed: int
) -> SensitivityTable:
    """Losses that fall by about four for every bit, differ by layer, kind and format, and scatter."""
    random = np.random.default_rng(seed)
    count = len(model_map.groups)
    kinds = np.array([_SENSITIVITY_OF_KIND[row % len(_KINDS)] for row in range(count)])
    ends = np.linspace(-1.0, 1.0, count) ** 4  # first and last layers are the sensitive ones
    of_group = kinds * (1 + 4 * ends) * random.lognormal(0.0, 0.6, count) / count
    of_format = np.array([0.25 * 4.0 ** (4 - FORMATS[fmt].nominal_bits) for fmt in formats])
    mean = of_group[:, None] * of_format * random.lognormal(0.0, 0.25, (count, len(formats)))
    spread = random.lognormal(0.0, 0.4, (sequences, count, 1))
    contributions: NDArray[np.float64] = mean * spread
    costs = build_cost_table(model_map, formats)
    columns = [costs.formats.index(fmt) for fmt in formats]
    contributions[:, ~costs.allowed[:, columns]] = np.nan
    return SensitivityTable(
        groups=tuple(group.name for group in model_map.groups),
        formats=tuple(formats),
        contributions=contributions,
        unit="nats_per_token",
        estimator=DEFAULT_ESTIMATOR,
    )


def _create(
    store: StudyStore, name: str, formats: Sequence[FormatName], seed: int, sequences: int
) -> StudyRecord:
    configuration = {
        "formats": list(formats),
        "calibration_sequences": sequences,
        "sequence_length": _TOKENS_PER_SEQUENCE,
        "container": "modelopt",
        "seed": seed,
    }
    fingerprint = f"synthetic {name}"
    return store.create_or_get(
        name=name,
        key=study_key(configuration, fingerprint),
        model_path=f"synthetic/{name}",
        fingerprint=fingerprint,
        architecture="SyntheticForCausalLM",
        configuration=configuration,
        versions={"autoq": "synthetic"},
        seed=seed,
    )


def _store_discovery(store: StudyStore, study: int, model_map: ModelMap) -> None:
    _store_stage(
        store,
        study,
        "discovery",
        {
            "model_map": model_map_to_json(model_map),
            "storage_dtype": "bfloat16",
            "inexpressible": [],
        },
    )
    _store_stage(store, study, "calibration", {"records": [], "tokens": _TOKENS_PER_SEQUENCE})


def _store_scores(store: StudyStore, study: int, table: SensitivityTable) -> None:
    sequences = len(table.contributions)
    store.begin_stage(study, "sensitivity")
    store.put_score_batch(study, 0, table.contributions, _STAGE_SECONDS["sensitivity"])
    scores, errors = table.scores(), table.standard_errors()
    store.put_sensitivity(
        study,
        [
            SensitivityCell(
                group=group,
                format=fmt,
                score=float(scores[row, column]),
                standard_error=float(errors[row, column]),
            )
            for row, group in enumerate(table.groups)
            for column, fmt in enumerate(table.formats)
        ],
    )
    payload = {
        "formats": list(table.formats),
        "unit": table.unit,
        "estimator": table.estimator,
        "sequences": sequences,
        "batches": 1,
        "peak_rss_bytes": _PEAK_BYTES,
    }
    store.finish_stage(study, "sensitivity", _STAGE_SECONDS["sensitivity"], payload)


def _store_plan(
    store: StudyStore,
    study: int,
    table: SensitivityTable,
    model_map: ModelMap,
    formats: Sequence[FormatName],
) -> int:
    costs = build_cost_table(model_map, formats)
    sizes = _sizes(costs)
    _store_stage(
        store,
        study,
        "sizes",
        {"bits": {g: dict(c) for g, c in sizes.cells.items()}, "fixed_bytes": sizes.fixed_bytes},
    )
    costs = with_active_bits(
        with_stored_sizes(costs, sizes), model_map, dict.fromkeys(model_map.slots, 1.0)
    )
    # Near enough for the picture of a study; what reads it solves anew.
    plan = solve(table, costs, _within_reach(costs), relative_gap=1e-3)
    label = f"{plan.budget_bits:g} bits"
    plan_id = store.add_plan(study, plan, label=label)
    payload = {"plan_id": plan_id, "label": label, "rules": [], "target": None}
    _store_stage(store, study, "solve", payload)
    return plan_id


def _within_reach(costs: CostTable) -> float:
    """The usual budget, or what every group takes in its smallest format where that is more."""
    least = np.where(costs.allowed, costs.effective_bits, np.iinfo(np.int64).max).min(axis=1)
    return max(_BITS, math.ceil(1e4 * float(least.sum()) / float(costs.weights.sum())) / 1e4)


def _sizes(costs: CostTable) -> StoredSizes:
    """What a container would write: each cell as the format defines it, and an output head."""
    cells = {
        group: {
            fmt: int(costs.stored_bits[row, column]) for column, fmt in enumerate(costs.formats)
        }
        for row, group in enumerate(costs.groups)
    }
    return StoredSizes(cells=cells, fixed_bytes=2 * _VOCABULARY * _HIDDEN)


def _store_measurements(
    store: StudyStore, study: int, plan_id: int, table: SensitivityTable, seed: int
) -> None:
    plan = store.plan(plan_id)
    predicted = plan.predicted_loss or 0.0
    sequences = len(table.contributions)
    values = predicted * np.random.default_rng(seed).lognormal(0.05, 0.2, sequences)
    mean = float(values.mean())
    tokens, data_sha256 = sequences * _TOKENS_PER_SEQUENCE, "0" * 64
    store.add_measurements(
        study,
        {"kl_divergence": (mean, (0.9 * mean, 1.1 * mean)), "top1_agreement": (0.97, (0.96, 0.98))},
        label=plan.label,
        plan_id=plan_id,
        details_by_metric={"kl_divergence": {"per_sequence": values.tolist()}},
        tokens=tokens,
        data_sha256=data_sha256,
    )
    floor = 0.002 * mean
    store.add_measurement(
        study,
        label="noise floor",
        metric="kl_divergence",
        value=floor,
        interval=(0.5 * floor, 2 * floor),
        tokens=tokens,
        data_sha256=data_sha256,
    )


def _store_export(store: StudyStore, study: int, plan_id: int) -> None:
    size = store.plan(plan_id).takes[Resource.STORED_BYTES]
    export = store.begin_export(
        study, plan_id=plan_id, container="modelopt", path="synthetic/checkpoint"
    )
    store.finish_export(
        export,
        files=[
            ("config.json", 1024, "1" * 64),
            ("model.safetensors", int(size), "2" * 64),
        ],
        verification={"verified": True},
    )


def _store_stage(store: StudyStore, study: int, name: str, payload: dict[str, object]) -> None:
    store.begin_stage(study, name)
    store.finish_stage(study, name, _STAGE_SECONDS.get(name, 0.05), payload)
