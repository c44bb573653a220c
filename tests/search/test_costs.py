"""Costs are exact sums of what the formats say of each matrix."""

import numpy as np
import pytest

from autoq.errors import InputError, UnknownNameError
from autoq.models import DecisionGroup, ModelMap, SlotKind, WeightSlot
from autoq.search import Resource
from autoq.search.costs import (
    StoredSizes,
    build_cost_table,
    effective_bits,
    peer_effective_bits,
    refusals,
    stored_bits_per_weight,
    stored_bytes,
    token_shares,
    with_active_bits,
    with_stored_sizes,
)

FORMATS = ("fp8", "nvfp4", "w4a8_awq")


def linear(name, out_features, in_features):
    return WeightSlot(
        name=name,
        module=name,
        parameter="weight",
        kind=SlotKind.LINEAR,
        out_features=out_features,
        in_features=in_features,
    )


def model_map(groups):
    """A map of {group: [(slot, out, in)]}."""
    slots = {
        slot: linear(slot, out, width) for rows in groups.values() for slot, out, width in rows
    }
    return ModelMap(
        architecture="Test",
        slots=slots,
        groups=tuple(
            DecisionGroup(name=name, slots=tuple(slot for slot, _, _ in rows), reason="test")
            for name, rows in groups.items()
        ),
        excluded=(),
        blocks=(),
    )


@pytest.fixture
def two_groups():
    return model_map({"qk": [("q", 4, 128), ("k", 2, 128)], "odd": [("odd", 3, 40)]})


def test_bits_are_what_hand_calculation_gives(two_groups):
    costs = build_cost_table(two_groups, FORMATS)

    assert costs.groups == ("qk", "odd")
    assert costs.formats == ("fp8", "nvfp4", "w4a8_awq", "none")
    assert costs.weights.tolist() == [768, 120]
    # 6 rows of 128: 8 bits; 4 bits and an 8-bit scale per 16; 4 bits and a 32-bit scale per 128.
    assert costs.effective_bits[0].tolist() == [6144, 3456, 3264, 12288]
    # Two matrices, each with a weight scale and an input scale of 32 bits.
    assert costs.stored_bits[0].tolist() == [6144 + 128, 3456 + 128, 3264 + 128, 12288]
    assert costs.peer_bits[0].tolist() == [768 * 8.0, 768 * 4.5, 768 * 4.0, 768 * 16.0]
    assert costs.effective_bits.dtype == costs.stored_bits.dtype == np.int64


def test_shapes_that_a_format_refuses_are_not_allowed(two_groups):
    costs = build_cost_table(two_groups, FORMATS)

    assert costs.allowed.tolist() == [[True] * 4, [True, False, False, True]]
    assert refusals(two_groups, FORMATS) == {
        ("odd", "nvfp4"): "odd: nvfp4 needs in_features divisible by 16, got 40",
        ("odd", "w4a8_awq"): "odd: w4a8_awq needs in_features divisible by 128, got 40",
    }


def test_one_refused_member_refuses_the_group():
    costs = build_cost_table(model_map({"g": [("a", 2, 32), ("b", 2, 40)]}), ["nvfp4"])

    assert costs.allowed.tolist() == [[False, True]]


def test_none_comes_last_once_and_repeats_are_dropped(two_groups):
    costs = build_cost_table(two_groups, ["none", "nvfp4", "fp8", "nvfp4"])

    assert costs.formats == ("nvfp4", "fp8", "none")


def test_unknown_format_is_answered_with_near_misses(two_groups):
    with pytest.raises(UnknownNameError, match=r"no format named 'nvpf4' \(did you mean nvfp4"):
        build_cost_table(two_groups, ["nvpf4"])


def test_totals_of_an_assignment(two_groups):
    costs = build_cost_table(two_groups, FORMATS)
    assignment = {"qk": "w4a8_awq", "odd": "none"}

    assert effective_bits(costs, assignment) == (3264 + 120 * 16) / 888
    assert stored_bits_per_weight(costs, assignment) == (3264 + 128 + 120 * 16) / 888
    assert peer_effective_bits(costs, assignment) == (768 * 4 + 120 * 16) / 888
    assert stored_bytes(costs, assignment) == (3264 + 128 + 120 * 16) // 8


def test_large_models_do_not_overflow():
    width = 2**20
    costs = build_cost_table(
        model_map({f"g{i}": [(f"s{i}", width, width)] for i in range(16)}), ["fp8"]
    )

    assert effective_bits(costs, dict.fromkeys(costs.groups, "none")) == 16.0
    assert stored_bytes(costs, dict.fromkeys(costs.groups, "fp8")) == 16 * (width**2 + 8)


def test_cost_ignores_group_order(two_groups):
    costs = build_cost_table(two_groups, FORMATS)
    assignment = {"qk": "nvfp4", "odd": "fp8"}
    backwards = dict(reversed(assignment.items()))

    assert effective_bits(costs, assignment) == effective_bits(costs, backwards)


@pytest.mark.parametrize(
    "assignment, message",
    [
        pytest.param(
            {"qk": "fp8"},
            r"must give every group a format, got none for 'odd'; name one of fp8",
            id="missing_group",
        ),
        pytest.param(
            {"qk": "fp8", "odd": "fp8", "x": "fp8"},
            r"may name only groups of the search, got 'x'; take the names from",
            id="unknown_group",
        ),
        pytest.param(
            {"qk": "int4", "odd": "fp8"},
            r"may use only formats of the search, got 'int4' for 'qk'; name one of fp8, nvfp4",
            id="unknown_format",
        ),
    ],
)
def test_unusable_assignments_are_refused(two_groups, assignment, message):
    with pytest.raises(InputError, match=message):
        effective_bits(build_cost_table(two_groups, FORMATS), assignment)


def test_stored_sizes_replace_the_definitions_and_add_the_rest(two_groups):
    costs = build_cost_table(two_groups, FORMATS)
    sizes = StoredSizes(cells={"qk": {"fp8": 7000, "none": 24576}}, fixed_bytes=1000)
    stored = with_stored_sizes(costs, sizes)

    assert stored.stored_bits[0].tolist() == [7000, 3456 + 128, 3264 + 128, 24576]
    assert stored.stored_bits[1].tolist() == costs.stored_bits[1].tolist()
    assert stored.effective_bits.tolist() == costs.effective_bits.tolist()
    assert stored.fixed == {Resource.STORED_BYTES: 1000.0}


def expert(name, out_features, in_features, number):
    return WeightSlot(
        name=name,
        module="mlp.experts",
        parameter="down_proj",
        kind=SlotKind.EXPERT,
        out_features=out_features,
        in_features=in_features,
        expert=number,
    )


def test_active_bits_count_experts_as_often_as_they_are_used():
    slots = [linear("o", 4, 128), expert("e0", 2, 128, 0), expert("e1", 2, 128, 1)]
    mixture = ModelMap(
        architecture="Test",
        slots={slot.name: slot for slot in slots},
        groups=(
            DecisionGroup(name="o", slots=("o",), reason="test"),
            DecisionGroup(name="experts", slots=("e0", "e1"), reason="test"),
        ),
        excluded=(),
        blocks=(),
    )
    # Of 100 tokens 75 went to the first expert; the layer before it was seen by its 64 rows.
    shares = token_shares(mixture, {"o": 64, "e0": 75, "e1": 25}, 100)
    assert shares == {"o": 1.0, "e0": 0.75, "e1": 0.25}

    costs = with_active_bits(build_cost_table(mixture, ["nvfp4"]), mixture, shares)
    table = costs.additional[Resource.ACTIVE_BITS]
    touched = 512 + 0.75 * 256 + 0.25 * 256
    assert table[0].tolist() == pytest.approx([512 * 4.5 / touched, 512 * 16 / touched])
    assert table[1].tolist() == pytest.approx([256 * 4.5 / touched, 256 * 16 / touched])


def test_active_bits_of_dense_models_are_effective_bits(two_groups):
    shares = token_shares(two_groups, {}, 10)
    costs = with_active_bits(build_cost_table(two_groups, ["fp8"]), two_groups, shares)
    table = costs.additional[Resource.ACTIVE_BITS]
    assert table == pytest.approx(costs.effective_bits / costs.weights.sum())


def test_active_bits_without_any_token_are_refused():
    nobody = model_map({"g": [("a", 2, 32)]})
    with pytest.raises(InputError, match="need slots that tokens reach"):
        with_active_bits(build_cost_table(nobody, ["fp8"]), nobody, {"a": 0.0})
