"""Claims in one picture: each interval in units of the smallest effect that matters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go

from subjattn.plots.drawing import FONT, Drawing, escaped


COLOURS = {
    "supported": "#00795c",
    "contradicted": "#b3261e",
    "no effect that matters": "#3d5a99",
    "undecided": "#7b8794",
}


def plot_claims(claims: Sequence[dict[str, Any]]) -> Drawing:
    """Estimate and interval of every claim and style, with the signs that they have in tables.

    Args:
        claims: as in `summary.json`. The band holds effects too small to matter. The thin line is the interval
            adjusted for the family of claims; small marks are replicates. An arrow points to the claimed side.
    """
    figure = Drawing()
    labels = []
    for claim in reversed(claims):
        for style, found in reversed(claim["styles"].items()):
            if found["estimate"] is None:
                continue
            side = "→" if claim["direction"] == "increase" else "←"
            labels.append(escaped(f"{claim['id']} · {style} {side}"))
            for trace in _traces(claim, found, labels[-1]):
                figure.add_trace(trace)
    for verdict, colour in COLOURS.items():
        figure.add_trace(
            go.Scatter(x=[None], y=[None], mode="markers", name=verdict, marker={"color": colour, "size": 10})
        )
    figure.add_vrect(x0=-1, x1=1, fillcolor="#e4e7eb", opacity=0.6, line_width=0, layer="below")
    figure.add_vline(x=0, line={"color": "#9aa5b1", "width": 1})
    figure.update_layout(
        font=FONT,
        height=158 + 34 * len(labels),
        width=900,
        margin={"l": 20, "r": 20, "t": 50, "b": 68},
        plot_bgcolor="white",
        xaxis={
            "title": "effect (arrow: claimed direction),<br>in smallest effects that matter",
            "gridcolor": "#e4e7eb",
        },
        yaxis={
            "categoryorder": "array",
            "categoryarray": labels,
            "automargin": True,
            "range": [-0.6, len(labels) - 0.4],
        },
        legend={"orientation": "h", "y": 1, "yanchor": "bottom", "x": 0},
    )
    return figure


def _traces(claim: dict[str, Any], found: dict[str, Any], label: str) -> Iterator[go.Scatter]:
    """Replicates as small marks, then the adjusted interval as a thin line and the plain one as a thick line."""

    def scaled(value: float) -> float:
        return float((value - claim["against"]) / claim["smallest_effect"])

    colour, middle = COLOURS[found["verdict"]], scaled(found["estimate"])
    plain, adjusted = ((found[f"{of}ci_low"], found[f"{of}ci_high"]) for of in ("", "adjusted_"))
    hover = f"{found['verdict']}: {found['estimate']:.4g} [{plain[0]:.4g}, {plain[1]:.4g}]<extra></extra>"
    if own := found.get("replicates"):
        yield go.Scatter(
            x=[scaled(value) for value in own.values()],
            y=[label] * len(own),
            mode="markers",
            marker={"color": colour, "size": 9, "symbol": "line-ns-open", "opacity": 0.7},
            text=list(own),
            hovertemplate="%{text}<extra></extra>",
            showlegend=False,
        )
    for ends, width in ((adjusted, 1), (plain, 3)):
        low, high = map(scaled, ends)
        yield go.Scatter(
            x=[low, high],
            y=[label, label],
            mode="lines",
            line={"color": colour, "width": width},
            hoverinfo="skip",
            showlegend=False,
        )
    yield go.Scatter(
        x=[middle],
        y=[label],
        mode="markers",
        marker={"color": colour, "size": 10},
        hovertemplate=hover,
        showlegend=False,
    )
