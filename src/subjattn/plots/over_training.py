"""Quantities over training: a line for each arm with the band of its interval, a panel for each quantity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots


HEIGHT = 260
"""Pixels of a panel."""


def plot_over_training(rows: Sequence[Mapping[str, Any]], units: Mapping[str, str] | None = None) -> go.Figure:
    """Draw rows of a summary's `over_training`: steps doubled from left to right, the model before training first.

    Args:
        rows: with `arm`, `measure`, `step`, `estimate`, `ci_low`, `ci_high`.
        units: of quantities, for the axes.
    """
    measures, arms = (list(dict.fromkeys(row[name] for row in rows)) for name in ("measure", "arm"))
    steps = sorted({row["step"] for row in rows})
    figure = make_subplots(
        rows=math.ceil(len(measures) / 2),
        cols=min(2, len(measures)),
        subplot_titles=measures,
        vertical_spacing=0.36 / math.ceil(len(measures) / 2),
    )
    for number, measure in enumerate(measures):
        place = {"row": number // 2 + 1, "col": number % 2 + 1}
        for arm, color in zip(arms, _colors(len(arms)), strict=True):
            own = sorted((row for row in rows if (row["measure"], row["arm"]) == (measure, arm)), key=_step)
            if not own:
                continue
            x = [_along(row["step"]) for row in own]
            edge = [row["ci_high"] for row in own] + [row["ci_low"] for row in reversed(own)]
            band = go.Scatter(
                x=[*x, *reversed(x)],
                y=edge,
                mode="lines",
                fill="toself",
                fillcolor=color,
                opacity=0.15,
                line={"width": 0},
            )
            figure.add_trace(band.update(legendgroup=arm, showlegend=False, hoverinfo="skip"), **place)
            line = go.Scatter(x=x, y=[row["estimate"] for row in own], mode="lines+markers", line={"color": color})
            label = "step %{customdata}: %{y:.3f}<extra>" + arm + "</extra>"
            line.update(name=arm, legendgroup=arm, showlegend=number == 0, customdata=[_step(row) for row in own])
            figure.add_trace(line.update(hovertemplate=label), **place)
        figure.update_yaxes(title_text=(units or {}).get(measure.partition(".")[0], ""), **place)
    ticks = [step for step in steps if step == 0 or step == steps[-1] or math.log2(step) % 1 == 0]
    figure.update_xaxes(
        tickvals=[_along(step) for step in ticks],
        ticktext=["base" if step == 0 else str(step) for step in ticks],
        title_text="optimiser steps",
    )
    n_rows = math.ceil(len(measures) / 2)
    return figure.update_layout(height=HEIGHT * n_rows + 120, template="plotly_white", margin={"t": 50, "b": 50})


def _step(row: Mapping[str, Any]) -> int:
    return int(row["step"])


def _along(step: int) -> float:
    return -1.0 if step == 0 else math.log2(step)


def _colors(n: int) -> list[str]:
    return [qualitative.D3[i % len(qualitative.D3)] for i in range(n)]
