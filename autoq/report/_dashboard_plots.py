"""Pictures for Optuna's dashboard, as plotly figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from autoq.errors import InputError
from autoq.report._colours import loss_range, ramp_colour
from autoq.report._data import CurvePoint, ReportData
from autoq.report._layer_grid import LayerGrid, layer_grid
from autoq.report._trials import TrialRow, source_text
from autoq.report.numbers import loss_text, unit_text

if TYPE_CHECKING:
    import plotly.graph_objects as go

_SOURCE_COLOURS: Mapping[str, str] = {
    "start": "#b5326b",
    "asked": "#b5326b",
    "refined": "#12805c",
    "uniform": "#20242a",
    "diverse": "#e08a2c",
    "swap": "#12805c",
    "multipliers": "#7a5bc4",
    "front": "#2aa3a3",
    "validation": "#7b8794",
}
_OTHER_COLOUR = "#8a6d3b"
_CURVE_COLOUR = "#3b82c4"
_NEAR_BITS = 1.0
"""Trials that differ by fewer bits are those of one budget; the picture then shows its
neighbourhood."""
_MARGIN_BITS = 0.5
_MARGIN_DECADES = 0.1
_FAR_BELOW = 30.0
_Place: TypeAlias = Callable[[TrialRow], float | None]
"""Where a trial is on the horizontal axis."""
_RAMP_STEPS = 12


def frontier_plot(data: ReportData, trials: Sequence[TrialRow]) -> go.Figure:
    """Loss against effective bits: the best plan for every budget, and what was measured."""
    graph = _plotly()
    comparable = data.unit == "nats_per_token"
    figure = graph.Figure(layout=_layout("Loss against bits", "effective bits per weight"))
    if comparable or not trials:
        _add_plans(figure, data.curve, name="predicted, best for each budget", mode="lines+markers")
        _add_plans(figure, data.uniform, name="predicted, one format", mode="markers")
    _add_trials(figure, trials, x=_bits)
    unit = data.unit if comparable or not trials else "nats_per_token"
    figure.update_yaxes(title=f"loss ({unit_text(unit)})", **_LOGARITHMIC)
    _add_floor(figure, data, trials, x=_bits)
    bits = [trial.effective_bits for trial in trials]
    if bits and max(bits) - min(bits) < _NEAR_BITS:
        _show_near(figure, min(bits) - _MARGIN_BITS, max(bits) + _MARGIN_BITS)
    return figure


def _show_near(figure: go.Figure, left: float, right: float) -> None:
    """Limit a figure with a logarithmic axis to these bits and the losses that stand over them."""
    losses: list[float] = []
    for trace in figure.data:
        above, below = trace.error_y.array, trace.error_y.arrayminus
        for index, (bits, loss) in enumerate(zip(trace.x, trace.y, strict=True)):
            if left <= bits <= right:
                losses.append(loss + (above[index] if above else 0.0))
                losses.append(loss - (below[index] if below else 0.0))
    shown = [math.log10(loss) for loss in losses if loss > 0.0]
    figure.update_xaxes(range=[left, right])
    figure.update_yaxes(range=[min(shown) - _MARGIN_DECADES, max(shown) + _MARGIN_DECADES])


def prediction_plot(data: ReportData, trials: Sequence[TrialRow]) -> go.Figure:
    """Measured against predicted loss of every trial; on the diagonal they are equal."""
    predicted = [trial for trial in trials if trial.predicted_loss and trial.predicted_loss > 0.0]
    title = f"predicted loss ({unit_text(data.unit)})"
    figure = _plotly().Figure(layout=_layout("Predicted against measured", title))
    figure.update_xaxes(**_LOGARITHMIC)
    figure.update_yaxes(title="measured KL divergence (nats per token)", **_LOGARITHMIC)
    ends = [trial.predicted_loss for trial in predicted if trial.predicted_loss is not None]
    if ends and data.unit == "nats_per_token":
        ends += [trial.measured.value for trial in predicted if trial.measured.value > 0.0]
        _add_line(figure, [min(ends), max(ends)], [min(ends), max(ends)], "equal", "dash")
    _add_trials(figure, predicted, x=_prediction)
    _add_floor(figure, data, predicted, x=_prediction)
    return figure


def layers_plot(data: ReportData) -> go.Figure:
    """Layer by format: what each decision would lose alone; rings are what the plan takes."""
    graph = _plotly()
    grid = layer_grid(data)
    low, high = loss_range(loss for row in grid.losses for loss in row)
    figure = graph.Figure(layout=_layout("Sensitivity by layer and format", ""))
    figure.add_trace(
        graph.Heatmap(
            x=_two_levels(grid.columns),
            y=list(grid.rows),
            z=[[_log(value) for value in row] for row in grid.losses],
            customdata=[[loss_text(value) for value in row] for row in grid.losses],
            hovertemplate="%{x}<br>%{y}: loss %{customdata}<extra></extra>",
            zmin=math.log10(low),
            zmax=math.log10(high),
            xgap=1,
            ygap=1,
            colorscale=[[i / _RAMP_STEPS, ramp_colour(i / _RAMP_STEPS)] for i in _ramp_places()],
            colorbar=_colour_bar(low, high, data.unit),
        )
    )
    _add_choices(figure, grid)
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, ticks="")
    figure.update_xaxes(showgrid=False)
    return figure


_LOGARITHMIC = {"type": "log", "exponentformat": "power"}


def _bits(trial: TrialRow) -> float | None:
    return trial.effective_bits


def _prediction(trial: TrialRow) -> float | None:
    return trial.predicted_loss


def _plotly() -> Any:
    try:
        import plotly.graph_objects as go
    except ImportError:
        raise InputError(
            "pictures for the dashboard need plotly, which is not installed; "
            "run `pip install 'autoq[dashboard]'`"
        ) from None
    return go


def _layout(title: str, x_title: str) -> dict[str, Any]:
    """A light page of its own: the dashboard's dark mode does not reach into figures.

    Plotly's default template is six kilobytes in every stored figure.
    """
    axis = {"gridcolor": "#e3e6ea", "linecolor": "#9aa3ad", "ticks": "outside", "zeroline": False}
    return {
        "template": "none",
        "title": {
            "text": title,
            "font": {"size": 17},
            "x": 0.02,
            "xanchor": "left",
            "y": 0.98,
            "yanchor": "top",
        },
        "margin": {"l": 76, "r": 24, "t": 92, "b": 56},
        "legend": {"orientation": "h", "yanchor": "bottom", "y": 1.01, "x": 0.0},
        "hovermode": "closest",
        "xaxis": {**axis, "title": x_title},
        "yaxis": dict(axis),
    }


def _add_plans(figure: go.Figure, points: Iterable[CurvePoint], *, name: str, mode: str) -> None:
    drawn = [point for point in points if point.predicted_loss > 0.0]
    if not drawn:
        return
    lines = mode != "markers"
    figure.add_trace(
        _plotly().Scatter(
            x=[round(point.effective_bits, 4) for point in drawn],
            y=[_short(point.predicted_loss) for point in drawn],
            text=[point.label for point in drawn],
            mode=mode,
            name=name,
            line={"color": _CURVE_COLOUR, "width": 2},
            marker={
                "color": _CURVE_COLOUR if lines else "#20242a",
                "size": 5 if lines else 9,
                "symbol": "circle" if lines else "square-open",
            },
            hovertemplate="%{text}<br>predicted loss %{y}<extra></extra>",
        )
    )


def _add_trials(figure: go.Figure, trials: Sequence[TrialRow], *, x: _Place) -> None:
    """One trace for each source, with 95 % intervals."""
    drawn = [trial for trial in trials if trial.measured.value > 0.0]
    for source in dict.fromkeys(trial.source for trial in drawn):
        members = [trial for trial in drawn if trial.source == source]
        colour = _SOURCE_COLOURS.get(source, _OTHER_COLOUR)
        figure.add_trace(
            _plotly().Scatter(
                x=[_short(x(trial)) for trial in members],
                y=[_short(trial.measured.value) for trial in members],
                error_y=_error_bars(members, colour),
                text=[_trial_text(trial) for trial in members],
                mode="markers",
                name=f"measured: {source_text(source)}",
                marker={"color": colour, "size": 8, "line": {"color": "white", "width": 0.5}},
                hovertemplate="%{text}<extra></extra>",
            )
        )


def _error_bars(trials: Sequence[TrialRow], colour: str) -> dict[str, Any]:
    metrics = [trial.measured for trial in trials]
    above = [m.high - m.value if m.high is not None else 0.0 for m in metrics]
    below = [m.value - m.low if m.low is not None else 0.0 for m in metrics]
    return {
        "type": "data",
        "symmetric": False,
        "array": [_short(max(value, 0.0)) for value in above],
        "arrayminus": [_short(max(value, 0.0)) for value in below],
        "color": f"{colour}66",  # many overlap
        "thickness": 1,
        "width": 0,
    }


def _trial_text(trial: TrialRow) -> str:
    return (
        f"trial {trial.number}: {trial.label or source_text(trial.source)}<br>"
        f"{trial.effective_bits:.4f} bits<br>predicted {loss_text(trial.predicted_loss)}, "
        f"measured {loss_text(trial.measured.value)}"
    )


def _add_floor(
    figure: go.Figure, data: ReportData, trials: Sequence[TrialRow], *, x: _Place
) -> None:
    """The noise floor as a line under the trials, where it is near enough not to flatten them."""
    measured = [trial.measured.value for trial in trials if trial.measured.value > 0.0]
    places = [place for trial in trials if (place := x(trial)) is not None]
    floor = data.noise_floor
    if floor is None or not floor.value > 0.0 or not measured:
        return
    name = f"noise floor {loss_text(floor.value)}"
    if floor.value * _FAR_BELOW < min(measured):
        figure.add_annotation(
            text=f"{name}, far below",
            x=0.01,
            y=0.02,
            xref="paper",
            yref="paper",
            showarrow=False,
        )
        return
    _add_line(figure, [min(places), max(places)], [floor.value] * 2, name, "dot")


def _add_line(
    figure: go.Figure, x: Sequence[float | None], y: Sequence[float | None], name: str, dash: str
) -> None:
    style = {"color": "#20242a", "dash": dash, "width": 1}
    figure.add_trace(
        _plotly().Scatter(
            x=list(x), y=list(y), mode="lines", name=name, line=style, hoverinfo="skip"
        )
    )


def _add_choices(figure: go.Figure, grid: LayerGrid) -> None:
    if not grid.chosen:
        return
    figure.add_trace(
        _plotly().Scatter(
            x=_two_levels([grid.columns[column] for _, column in grid.chosen]),
            y=[grid.rows[row] for row, _ in grid.chosen],
            mode="markers",
            name="what the plan takes",
            showlegend=True,
            marker={
                "symbol": "circle-open",
                "size": 11,
                "color": "#1565c0",
                "line": {"width": 2.5},
            },
            hoverinfo="skip",
        )
    )


def _two_levels(columns: Sequence[tuple[str, str]]) -> list[list[str]]:
    return [[column[0] for column in columns], [column[1] for column in columns]]


def _ramp_places() -> range:
    return range(_RAMP_STEPS + 1)


def _colour_bar(low: float, high: float, unit: str) -> dict[str, Any]:
    powers = range(math.ceil(math.log10(low)), math.floor(math.log10(high)) + 1)
    places: Sequence[float] = list(powers) or [math.log10(low), math.log10(high)]
    return {
        "title": {"text": f"loss<br>({unit_text(unit)})", "side": "top"},
        "tickvals": places,
        "ticktext": [f"10<sup>{place}</sup>" for place in powers]
        or [loss_text(low), loss_text(high)],
    }


def _log(loss: float | None) -> float | None:
    return round(math.log10(loss), 4) if loss is not None and loss > 0.0 else None


def _short(value: float | None) -> float | None:
    """Five digits: more are noise, and every figure is stored as text."""
    return None if value is None else float(f"{value:.5g}")
