"""Claims in one picture: each interval in units of the smallest effect that matters."""

from __future__ import annotations

import html
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from subjattn.plots.heatmaps import FONT


COLOURS = {
    "supported": "#00795c",
    "contradicted": "#b3261e",
    "no effect that matters": "#3d5a99",
    "undecided": "#7b8794",
}


def plot_claims(claims: Sequence[dict[str, Any]]) -> go.Figure:
    """Estimate and interval of every claim and style, turned so that the claimed direction is right.

    Args:
        claims: as in `summary.json`. The band holds effects too small to matter.
    """
    figure = go.Figure()
    labels = []
    for claim in reversed(claims):
        turn = 1 if claim["direction"] == "increase" else -1
        unit = turn * claim["smallest_effect"]
        for style, found in reversed(claim["styles"].items()):
            if found["estimate"] is None:
                continue
            label = html.escape(f"{claim['id']} · {style}")
            labels.append(label)
            low, high = sorted((found["ci_low"] / unit, found["ci_high"] / unit))
            middle = found["estimate"] / unit
            figure.add_trace(
                go.Scatter(
                    x=[middle],
                    y=[label],
                    error_x={
                        "type": "data",
                        "symmetric": False,
                        "array": [high - middle],
                        "arrayminus": [middle - low],
                    },
                    marker={"color": COLOURS[found["verdict"]], "size": 10},
                    hovertemplate=f"{found['verdict']}: {found['estimate']:.4g} "
                    f"[{found['ci_low']:.4g}, {found['ci_high']:.4g}]<extra></extra>",
                    showlegend=False,
                )
            )
    for verdict, colour in COLOURS.items():
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", name=verdict, marker={"color": colour, "size": 10})
        )
    figure.add_vrect(x0=-1, x1=1, fillcolor="#e4e7eb", opacity=0.6, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": "#9aa5b1", "width": 1})
    figure.update_layout(
        font=FONT,
        height=140 + 34 * len(labels),
        width=900,
        margin={"l": 20, "r": 20, "t": 50, "b": 50},
        plot_bgcolor="white",
        xaxis={"title": "effect in the claimed direction, in smallest effects that matter", "gridcolor": "#e4e7eb"},
        yaxis={
            "categoryorder": "array",
            "categoryarray": labels,
            "automargin": True,
            "range": [-0.6, len(labels) - 0.4],
        },
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
    )
    return figure
