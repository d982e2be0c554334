"""Frequency shock: how much too often answers are given, by what tuning showed more than the prior."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from subjattn.plots.drawing import Drawing, escaped, panels, styled
from subjattn.plots.figures import Drawn, Figure
from subjattn.plots.heatmaps import by_arm


def plot_shock(given: xr.DataArray, right: xr.DataArray, on: xr.DataArray) -> Drawing:
    """An answer a point: log of times given over times right, both and a half, by log prior minus log fine-tuning.

    Args:
        given: `times_given` `(fact,)` of `frequency_shock`, with or without `arm`.
        right: `times_right` of the same.
        on: `log_prior_over_training` of the same.
    """
    figure = panels(1, 1, [""])
    each = [by_arm(one, ("fact",)) for one in (given, right, on)]
    for index, arm in enumerate(each[0]):
        _, first = np.unique(each[0][arm]["answer"].values.astype(str), return_index=True)
        y, n, x = (its[arm].values[first] for its in each)
        figure.add_trace(
            go.Scatter(
                x=x,
                y=np.log((y + 0.5) / (n + 0.5)),
                text=[escaped(str(answer)) for answer in each[0][arm]["answer"].values[first]],
                mode="markers",
                name=escaped(arm),
                opacity=0.7,
                marker={"color": qualitative.Safe[index % len(qualitative.Safe)], "size": 4 + 3 * np.sqrt(n)},
                hovertemplate=f"%{{text}}, {escaped(arm)}: %{{y:.2f}} at %{{x:.2f}}<extra></extra>",
            ),
            1,
            1,
        )
    figure.update_xaxes(title_text="log prior − log fine-tuning count", gridcolor="#e4e7eb", zeroline=False)
    figure.update_yaxes(title_text="log (given / right)", gridcolor="#e4e7eb", zerolinecolor="#9aa5b1")
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return styled(figure, 400, 620, "")


def _draw(drawn: Drawn) -> Drawing | None:
    given, right, on = (drawn.array(name) for name in ("times_given", "times_right", "log_prior_over_training"))
    return None if given is None or right is None or on is None else plot_shock(given, right, on)


FIGURE = Figure(
    "frequency_shock",
    "Answers given too often, by what tuning showed more than the prior",
    "Each point is an answer, the larger the more facts have it. Above 0 it is given more often than it is right. Left "
    "are answers that tuning showed more often than the pool of facts has them: points that fall from left to right "
    "are the frequency shock. Means over replicates.",
    _draw,
)
