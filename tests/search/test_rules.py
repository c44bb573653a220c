"""Rules bind whole groups, and say what is wrong when they cannot."""

import pytest

from autoq.errors import InputError, UnknownNameError
from autoq.models import DecisionGroup, ExcludedSlot, ModelMap, SlotKind, WeightSlot
from autoq.search.costs import build_cost_table
from autoq.search.rules import Rule, apply_rules, parse_rule

FORMATS = ("fp8", "nvfp4", "none")
PARTS = {"self_attn.qk": ("self_attn.q_proj", "self_attn.k_proj"), "mlp.down": ("mlp.down_proj",)}


def two_layers(in_features=64):
    slots, groups = {}, []
    for layer in ("model.layers.0", "model.layers.1"):
        for group, members in PARTS.items():
            names = tuple(f"{layer}.{member}" for member in members)
            for name in names:
                slots[name] = WeightSlot(
                    name=name,
                    module=name,
                    parameter="weight",
                    kind=SlotKind.LINEAR,
                    out_features=4,
                    in_features=in_features,
                )
            groups.append(DecisionGroup(name=f"{layer}.{group}", slots=names, reason="test"))
    return ModelMap(
        architecture="Test",
        slots=slots,
        groups=tuple(groups),
        excluded=(ExcludedSlot(name="lm_head", reason="output head", weights=9),),
        blocks=("model.layers.0", "model.layers.1"),
    )


def allowed(*rules, model_map=None):
    """{group without "model.layers.": allowed formats} after the rules."""
    model_map = model_map or two_layers()
    costs = apply_rules(
        build_cost_table(model_map, FORMATS), model_map, [parse_rule(rule) for rule in rules]
    )
    return {
        group.removeprefix("model.layers."): {
            name for name, yes in zip(costs.formats, row, strict=True) if yes
        }
        for group, row in zip(costs.groups, costs.allowed, strict=True)
    }


def test_parse_reads_pattern_and_formats():
    assert parse_rule(" *down_proj = fp8, none,fp8") == Rule(
        pattern="*down_proj", formats=("fp8", "none")
    )
    assert str(parse_rule("*down_proj=fp8,none")) == "*down_proj=fp8,none"


@pytest.mark.parametrize("text", ["", "model.layers.0.*", "=none", "*=", "*=fp8,,none"])
def test_parse_refuses_other_shapes(text):
    with pytest.raises(InputError, match=r"must look like 'PATTERN=FORMAT\[,FORMAT...\]', got '"):
        parse_rule(text)


def test_parse_answers_an_unknown_format_with_near_misses():
    with pytest.raises(
        UnknownNameError, match=r"rule '\*=nvfp': no format named 'nvfp' \(did you mean nvfp4"
    ):
        parse_rule("*=nvfp")


def test_a_rule_restricts_only_what_it_matches():
    assert allowed("model.layers.0.*=none") == {
        "0.self_attn.qk": {"none"},
        "0.mlp.down": {"none"},
        "1.self_attn.qk": set(FORMATS),
        "1.mlp.down": set(FORMATS),
    }


def test_one_matching_member_binds_the_group():
    found = allowed("*.0.*k_proj=fp8")

    assert found["0.self_attn.qk"] == {"fp8"}
    assert found["0.mlp.down"] == set(FORMATS)


@pytest.mark.parametrize("pattern", ["*.1.self_attn.qk", "model.layers.1.self_attn.q_proj"])
def test_group_and_module_names_match(pattern):
    assert allowed(f"{pattern}=nvfp4")["1.self_attn.qk"] == {"nvfp4"}


def test_rules_add_up():
    found = allowed("*=fp8,none", "*.0.*=nvfp4,none")

    assert found["0.mlp.down"] == {"none"}
    assert found["1.mlp.down"] == {"fp8", "none"}


def test_the_table_that_came_in_is_left_alone():
    model_map = two_layers()
    costs = build_cost_table(model_map, FORMATS)
    apply_rules(costs, model_map, [parse_rule("*=none")])

    assert costs.allowed.all()


def test_excluded_weights_may_be_asked_to_stay_as_they_are():
    assert allowed("lm_head=none") == allowed()


@pytest.mark.parametrize(
    "rule, message",
    [
        pytest.param(
            "model.layer.0.*=none",
            r"rule 'model.layer.0.\*=none' must match at least one group, weight or module, got "
            r"no match for 'model.layer.0.\*'; did you mean model.layers.0.\* or ",
            id="misspelt_prefix",
        ),
        pytest.param("*donw_proj=none", r"did you mean \*down_proj or \*", id="misspelt_suffix"),
        pytest.param("zzz=none", r"got no match for 'zzz'; list the names with", id="far_off"),
        pytest.param(
            "lm_head=fp8",
            r"rule 'lm_head=fp8' must match something that is searched, got only 'lm_head', which "
            r"is excluded \(output head\); include it in the search or drop the rule",
            id="excluded",
        ),
        pytest.param(
            "*=w4a8_awq,none",
            r"rule '\*=w4a8_awq,none' may name only formats of this search \(fp8, nvfp4, none\), "
            r"got 'w4a8_awq'; add it to --formats or leave it out of the rule",
            id="format_not_searched",
        ),
    ],
)
def test_rules_that_cannot_work_are_refused(rule, message):
    with pytest.raises(InputError, match=message):
        allowed(rule)


def test_a_rule_that_contradicts_an_earlier_one_is_refused():
    with pytest.raises(
        InputError,
        match=r"rule '\*=nvfp4' leaves group 'model.layers.0.mlp.down' without any format "
        r"\(an earlier rule forbids what this one allows\); add none to the rule, or narrow",
    ):
        allowed("*down*=fp8", "*=nvfp4")


def test_a_rule_that_a_shape_contradicts_names_the_shape():
    with pytest.raises(
        InputError,
        match=r"rule '\*=nvfp4' leaves group 'model.layers.0.self_attn.qk' without any format "
        r"\(model.layers.0.self_attn.q_proj: nvfp4 needs in_features divisible by 16, got 40\)",
    ):
        allowed("*=nvfp4", model_map=two_layers(in_features=40))
