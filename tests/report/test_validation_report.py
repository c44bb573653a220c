"""A validation as picture, page and part of the report."""

from __future__ import annotations

import re
from typing import Any

import pytest

from autoq.errors import InputError
from autoq.report import (
    render_html,
    render_validation_html,
    report_data,
    validation_data,
    validation_png,
)
from autoq.report._validation import line_text, quality_cells, validation_text


def interval(value: float) -> dict[str, float]:
    return {"value": value, "low": value * 0.8, "high": value * 1.2}


def validation(**changes: Any) -> dict[str, Any]:
    """What `Study.validation` gives, with plans at round places."""
    quality = {"rank_correlation": 0.98, "slope": 1.25, "ratio": 0.5, "coverage": 2 / 3}
    found = {
        "random": 2,
        "near": 1,
        "seed": 0,
        "sequences": 8,
        "tokens": 2048,
        "data": "held-out text",
        "data_sha256": "00",
        "unit": "nats_per_token",
        "estimator": "token_projection",
        "noise_floor": interval(1e-4),
        "quality": {
            "all": {"plans": 3, **quality},
            "random": {"plans": 2, **quality, "rank_correlation": 1.0},
            "near": {"plans": 1, **dict.fromkeys(quality)},
        },
        "calibration": {
            "slope": 1.25,
            "intercept": 0.125,
            "residual": 0.1,
            "plans": 3,
            "mean_log_predicted": -4.0,
            "spread_log_predicted": 2.0,
        },
        "calibrated_on": "near",
        "calibrated_coverage": 0.9,
        "plans": [
            {
                "plan_id": index,
                "label": f"validation {kind} {index}, seed 0",
                "kind": kind,
                "effective_bits": bits,
                "predicted": interval(loss),
                "measured": interval(loss / 2),
            }
            for index, (kind, bits, loss) in enumerate(
                [("random", 5.0, 0.1), ("random", 9.0, 0.01), ("near", 6.0, 0.04)]
            )
        ],
    }
    return {**found, **changes}


def data(**changes: Any) -> Any:
    return validation_data(validation(**changes))


def test_it_is_said_in_words() -> None:
    assert validation_text(data()) == (
        "rank correlation 0.980 over 3 plans, slope 1.250, measured / predicted 0.500"
    )
    assert line_text(data().line) == (
        "log measured = 0.125 + 1.250 log predicted, from the near-optimal plans; its 95 % "
        "intervals held 90.00 % of plans left out"
    )
    assert [quality_cells(row, "nats_per_token") for row in data().quality] == [
        ["all", "3", "0.980", "1.250", "0.500", "66.67 %"],
        ["random", "2", "1.000", "1.250", "0.500", "66.67 %"],
        ["near-optimal", "1", "-", "-", "-", "-"],
    ]


def test_losses_in_other_units_have_no_ratio() -> None:
    found = data(unit="relative")
    assert "measured / predicted" not in validation_text(found)
    assert quality_cells(found.overall, found.unit)[-2:] == ["-", "-"]


def test_a_study_without_validation_has_none() -> None:
    assert validation_data(None) is None


def test_the_picture_is_drawn(tmp_path: Any) -> None:
    path = tmp_path / "scatter.png"
    validation_png("llama", data(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert 10_000 < path.stat().st_size < 200_000
    for changes in (
        {"calibration": None},
        {"noise_floor": None},
        {"noise_floor": interval(0.0)},
        {"unit": "relative"},
    ):
        validation_png("llama", data(**changes), path)


def test_a_picture_of_nothing_is_refused(tmp_path: Any) -> None:
    plans = [{**row, "predicted": interval(0.0)} for row in validation()["plans"]]
    with pytest.raises(InputError, match="a picture needs a plan with a predicted and a measured"):
        validation_png("llama", data(plans=plans), tmp_path / "scatter.png")
    assert not list(tmp_path.iterdir())


def circles(page: str, style: str) -> list[tuple[float, float]]:
    """Centres of the marks of one kind, without the legend's."""
    found = re.findall(rf'<circle cx="([\d.]+)" cy="([\d.]+)" r="3.5" class="{style}">', page)
    return [(float(x), float(y)) for x, y in found]


def test_the_page_shows_every_plan() -> None:
    page = render_validation_html("llama <1>", data())
    assert "llama &lt;1&gt;" in page
    assert (len(circles(page, "random")), len(circles(page, "near"))) == (2, 1)
    for text in ("validation near 2, seed 0", "near-optimal plans", "noise floor 1.000e-04"):
        assert text in page
    assert "http" not in page


def test_marks_stand_where_their_numbers_say() -> None:
    # Both axes span the same values, so equal factors are equal shares of them. From 0.1 to 0.01
    # predicted is ten times; so is from 0.05 to 0.005 measured.
    (x1, y1), (x2, y2) = circles(render_validation_html("llama", data()), "random")
    assert (x1 - x2) / (680 - 84) == pytest.approx((y2 - y1) / (424 - 46), rel=1e-3)
    assert x1 > x2
    assert y1 < y2


def test_the_report_shows_validation_ties_and_floor(make_summary: Any) -> None:
    summary = make_summary(validation=validation(), noise_floor=interval(0.002))
    summary["predicted_calibrated"] = interval(0.031)
    tied = {"difference": 0.001, "low": -0.1, "high": 0.1, "verdict": "tie"}
    own = summary["measurements"][0]
    summary["measurements"] = [own, {**own, "label": "uniform fp8", "this_plan": tied}]
    page = render_html(report_data(summary, []))
    assert len(circles(page, "near")) == 1
    assert "rank correlation 0.980 over 3 plans" in page
    assert "predicted, calibrated" in page
    assert "0.03100" in page
    assert "noise floor 0.002000" in page
    assert page.count("<td>tie</td>") + page.count('<td class="number">tie</td>') == 1
    plain = render_html(report_data(make_summary(), []))
    for text in ("Quality of the prediction", "predicted, calibrated", "noise floor"):
        assert text not in plain
