"""What the dashboard shows, from plain data: note, plots, plan files, grid of layers."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

import pytest

from autoq.report import (
    Metric,
    NoteFacts,
    TrialRow,
    frontier_plot,
    heat_map_png,
    layers_plot,
    plan_csv,
    plan_json,
    prediction_plot,
    render_heat_map_html,
    report_data,
    study_note,
)
from autoq.report._dashboard_note import escaped
from autoq.report._layer_grid import layer_grid

pytest.importorskip("plotly")


def trial(number: int, value: float, **changes: Any) -> TrialRow:
    known: dict[str, Any] = {
        "number": number,
        "source": "swap",
        "label": "",
        "effective_bits": 5.5,
        "predicted_loss": 0.03,
        "measured": Metric(name="kl_divergence", value=value, low=value / 2, high=value * 2),
    }
    return TrialRow(**{**known, **changes})


def facts(**changes: Any) -> NoteFacts:
    known: dict[str, Any] = {
        "plan_label": "6 bits",
        "objective": "KL divergence",
        "refines": None,
        "trials": (),
        "unfinished": 0,
        "sequences": None,
        "result": "",
        "files": (),
    }
    return NoteFacts(**{**known, **changes})


def trace_called(figure: Any, beginning: str) -> Any:
    return next(trace for trace in figure.data if trace.name.startswith(beginning))


# Note


def test_markdown_in_names_is_shown_and_not_obeyed() -> None:
    assert escaped("a|b *c* <img>\n#d") == "a\\|b \\*c\\* \\<img\\> \\#d"


def test_a_models_path_cannot_break_the_table(make_summary: Any) -> None:
    data = report_data(make_summary(model="a|b\n\n# title"), [])
    lines = study_note(data, facts()).splitlines()
    assert "| model | a\\|b \\# title |" in lines


def test_the_plan_that_was_measured_under_the_label_is_the_one_told(make_summary: Any) -> None:
    note = study_note(report_data(make_summary(), []), facts())
    assert "| measured | KL divergence 0.05000 nats per token (95 %: 0.04000 to 0.07000)" in note
    other = study_note(report_data(make_summary(), []), facts(plan_label="5 bits"))
    assert "| measured | not yet |" in other


def test_only_a_refinement_has_best_trials(make_summary: Any) -> None:
    data = report_data(make_summary(), [])
    trials = (trial(0, 0.04), trial(1, 0.02), trial(2, 0.03))
    assert "## Best trials" not in study_note(data, facts(trials=trials))
    note = study_note(data, facts(trials=trials, refines="6 bits"))
    rows = [line for line in note.splitlines() if "formats exchanged" in line]
    assert [row.split(" | ")[0] for row in rows] == ["| 1", "| 2", "| 0"]


def test_losses_in_other_units_are_not_compared_with_divergence(make_summary: Any) -> None:
    note = study_note(report_data(make_summary(unit="relative"), []), facts())
    assert "only ranks plans" in note
    assert "1 is exact" not in note


def test_an_objective_of_the_users_is_named(make_summary: Any) -> None:
    data = report_data(make_summary(), [])
    assert "Optuna minimises `kl + ppl`." in study_note(data, facts(objective="kl + ppl"))
    assert "Optuna minimises" not in study_note(data, facts())


# Plots


def test_measured_trials_stand_over_their_bits_with_their_intervals(
    make_summary: Any, plans: Any
) -> None:
    data = report_data(make_summary(), plans)
    figure = frontier_plot(data, [trial(0, 0.04, effective_bits=4.75), trial(1, 0.02)])
    measured = trace_called(figure, "measured: formats exchanged")
    assert (list(measured.x), list(measured.y)) == ([4.75, 5.5], [0.04, 0.02])
    assert list(measured.error_y.array) == [0.04, 0.02]
    assert list(measured.error_y.arrayminus) == [0.02, 0.01]
    curve = trace_called(figure, "predicted, best")
    assert list(curve.x) == [4.5, 5.9375, 6.0, 8.0]  # what has no loss has no place on a log axis


def test_trials_of_one_budget_are_shown_from_near(make_summary: Any, plans: Any) -> None:
    data = report_data(make_summary(), plans)
    near = frontier_plot(data, [trial(0, 0.04), trial(1, 0.02, effective_bits=5.75)])
    assert near.layout.xaxis.range == (5.0, 6.25)
    # over these bits: trials from 0.01 to 0.08, the plans of 5.9375 and 6 bits between them
    expected = (math.log10(0.01) - 0.1, math.log10(0.08) + 0.1)
    assert near.layout.yaxis.range == pytest.approx(expected)
    far = frontier_plot(data, [trial(0, 0.04), trial(1, 0.02, effective_bits=8.0)])
    assert far.layout.xaxis.range is None


def test_predictions_that_are_no_divergence_are_not_drawn_beside_it(
    make_summary: Any, plans: Any
) -> None:
    data = report_data(make_summary(unit="relative"), plans)
    names = [trace.name for trace in frontier_plot(data, [trial(0, 0.04)]).data]
    assert names == ["measured: formats exchanged"]
    names = [trace.name for trace in prediction_plot(data, [trial(0, 0.04)]).data]
    assert names == ["measured: formats exchanged"]


def test_the_diagonal_spans_predictions_and_measurements(make_summary: Any) -> None:
    data = report_data(make_summary(), [])
    trials = [trial(0, 0.04, predicted_loss=0.01), trial(1, 0.02, predicted_loss=0.03)]
    diagonal = trace_called(prediction_plot(data, trials), "equal")
    assert list(diagonal.x) == list(diagonal.y) == [0.01, 0.04]


def test_a_trial_without_a_prediction_is_left_out(make_summary: Any) -> None:
    data = report_data(make_summary(), [])
    figure = prediction_plot(data, [trial(0, 0.04, predicted_loss=None), trial(1, 0.02)])
    assert list(trace_called(figure, "measured").y) == [0.02]


@pytest.mark.parametrize(("floor", "drawn"), [(0.001, True), (1e-6, False)])
def test_a_noise_floor_far_below_is_told_and_not_drawn(
    make_summary: Any, floor: float, drawn: bool
) -> None:
    found = {"value": floor, "low": floor, "high": floor}
    figure = frontier_plot(report_data(make_summary(noise_floor=found), []), [trial(0, 0.02)])
    assert any(trace.name.startswith("noise floor") for trace in figure.data) is drawn
    told = [note.text for note in figure.layout.annotations]
    assert told == ([] if drawn else ["noise floor 1.000e-06, far below"])


def test_plots_of_a_study_without_trials_can_be_drawn(make_summary: Any, plans: Any) -> None:
    data = report_data(make_summary(), plans)
    assert trace_called(frontier_plot(data, []), "predicted, best")
    assert len(prediction_plot(data, []).data) == 0


def test_the_heat_map_has_logarithms_of_losses_and_rings_for_the_plan(make_summary: Any) -> None:
    data = report_data(make_summary(), [])
    figure = layers_plot(data)
    heat_map, rings = figure.data
    columns = list(zip(*heat_map.x, strict=True))
    place = columns.index(("self_attn.o_proj", "nvfp4"))
    assert list(heat_map.y) == ["block 0", "block 1"]
    assert heat_map.z[1][place] == pytest.approx(math.log10(0.02), abs=1e-4)
    assert set(zip(rings.y, *rings.x, strict=True)) == {
        ("block 0", "self_attn.q/k/v", "nvfp4"),
        ("block 0", "self_attn.o_proj", "fp8"),
        ("block 1", "self_attn.q/k/v", "fp8"),
        ("block 1", "mlp.down_proj", "nvfp4"),
    }


def test_figures_are_small_enough_to_keep_as_text(make_summary: Any, plans: Any) -> None:
    data = report_data(make_summary(blocks=48), plans)
    trials = [trial(number, 0.02) for number in range(200)]
    assert len(layers_plot(data).to_json()) < 30_000
    assert len(frontier_plot(data, trials).to_json()) < 60_000


# Grid


def test_stacks_stay_apart_and_so_do_two_kinds_of_attention(make_summary: Any) -> None:
    summary = make_summary(blocks=1)
    names = (
        "encoder.block.0.attention.o",
        "decoder.block.0.attention.o",
        "decoder.block.0.cross.o",
        "pooler",
    )
    groups = [{**summary["groups"][0], "name": name, "format": "fp8"} for name in names]
    grid = layer_grid(report_data({**summary, "groups": groups}, []))
    assert grid.rows == ("encoder.block 0", "decoder.block 0", "outside")
    assert [kind for kind, fmt in grid.columns if fmt == "fp8"] == [
        "attention.o",
        "cross.o",
        "pooler",
    ]
    places = [(grid.rows[row], grid.columns[column]) for row, column in grid.chosen]
    assert places == [
        ("encoder.block 0", ("attention.o", "fp8")),
        ("decoder.block 0", ("attention.o", "fp8")),
        ("decoder.block 0", ("cross.o", "fp8")),
        ("outside", ("pooler", "fp8")),
    ]
    missing = grid.columns.index(("cross.o", "fp8"))
    assert grid.losses[0][missing] is None


# Files


def test_a_plan_as_csv_has_a_line_per_group(make_summary: Any) -> None:
    groups = make_summary()["groups"]
    groups[0] = {**groups[0], "slots": ["a.q", "a.k"], "reason": 'fused, "qk"'}
    rows = list(csv.DictReader(io.StringIO(plan_csv(groups))))
    assert [row["name"] for row in rows] == [group["name"] for group in groups]
    assert (rows[0]["slots"], rows[0]["reason"]) == ("a.q a.k", 'fused, "qk"')
    assert float(rows[1]["effective_bits"]) == 4.5


def test_a_plan_as_json_names_groups_and_slots(make_summary: Any) -> None:
    groups = [{**make_summary()["groups"][0], "name": "a.qk", "slots": ["a.q", "a.k"]}]
    found = json.loads(plan_json(groups, {"study": "s"}))
    fmt = groups[0]["format"]
    assert found == {
        "study": "s",
        "groups": {"a.qk": fmt},
        "assignment": {"a.q": fmt, "a.k": fmt},
    }


def test_the_heat_map_as_files(make_summary: Any) -> None:
    data = report_data(make_summary(study="<llama>"), [])
    picture = io.BytesIO()
    heat_map_png(data, picture)
    again = io.BytesIO()
    heat_map_png(data, again)
    assert picture.getvalue().startswith(b"\x89PNG")
    assert picture.getvalue() == again.getvalue()  # or every opening would write it anew
    assert "<h1>&lt;llama&gt;</h1>" in render_heat_map_html(data)
