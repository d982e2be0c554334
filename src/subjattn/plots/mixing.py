"""Model mixing: accuracy by the tuned model's share, and the share that validation facts chose."""

from __future__ import annotations

import math

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots


HEIGHT = 260
"""Pixels of a panel."""
COLORS = {"validation": "#7f7f7f", "test": "#1f77b4"}


def plot_mixing(curves: pd.DataFrame) -> go.Figure:
    """Draw what `mixing_curves` returns: a panel for each arm, means over replicates, the chosen shares as dots."""
    arms = list(dict.fromkeys(curves["arm"]))
    n_rows = math.ceil(len(arms) / 2)
    figure = make_subplots(
        rows=n_rows, cols=min(2, len(arms)), subplot_titles=arms, vertical_spacing=0.36 / n_rows, shared_yaxes=True
    )
    for number, arm in enumerate(arms):
        place = {"row": number // 2 + 1, "col": number % 2 + 1}
        own = curves[curves["arm"] == arm]
        for role, color in COLORS.items():
            for _, replicate in own.groupby(["draw", "seed"], dropna=False):
                thin = go.Scatter(x=replicate["weight"], y=replicate[role], mode="lines", line={"color": color})
                figure.add_trace(thin.update(opacity=0.3, line_width=1, showlegend=False, hoverinfo="skip"), **place)
            mean = own.groupby("weight")[role].mean()
            line = go.Scatter(x=mean.index, y=mean, mode="lines", name=f"{role} facts", legendgroup=role)
            line.update(line={"color": color, "width": 3}, showlegend=number == 0)
            figure.add_trace(line.update(hovertemplate="share %{x}: %{y:.3f}<extra>" + role + "</extra>"), **place)
        picked = own[own["chosen"]]
        dots = go.Scatter(x=picked["weight"], y=picked["validation"], mode="markers", name="chosen", legendgroup="dot")
        dots.update(marker={"color": "#d62728", "size": 9, "opacity": 0.7}, showlegend=number == 0)
        figure.add_trace(dots.update(hovertemplate="chosen: %{x}<extra></extra>"), **place)
        figure.update_xaxes(title_text="share of the tuned model", range=[-0.03, 1.03], **place)
    figure.update_yaxes(title_text="accuracy", col=1)
    return figure.update_layout(height=HEIGHT * n_rows + 120, template="plotly_white", margin={"t": 50, "b": 50})
