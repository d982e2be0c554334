"""Dose–response of attention as lines, the control dashed."""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from subjattn.plots.drawing import Drawing, escaped, panels, styled
from subjattn.plots.heatmaps import by_arm


_AXES = {"add": "added to the scores", "times": "factor of the weights"}


def plot_doses(change: xr.DataArray, control: xr.DataArray | None = None) -> Drawing:
    """Mean change of the answer by dose, a line per arm; as many other edges dashed.

    Args:
        change: `(fact, dose)`, with or without `arm`, from `rescale`.
        control: the same of other edges; None: the array's own coordinate, where it has one.

    Raises:
        BadInput: other dimensions.
    """
    if control is None and "control" in change.coords:
        control = change["control"].reset_coords(drop=True)
    unit, figure = escaped(str(change.attrs.get("unit", ""))), panels(1, 1, [""])
    for index, (arm, array) in enumerate(by_arm(change, ("fact", "dose")).items()):
        other = control.sel(arm=arm) if control is not None and "arm" in control.dims else control
        for shown, dash, kind in ((array, "solid", "the route"), (other, "dash", "other edges")):
            if shown is None:
                continue
            mean = shown.sortby("dose").mean("fact")
            name = ", ".join(filter(None, (arm, kind)))
            figure.add_trace(
                go.Scatter(
                    x=mean["dose"].values,
                    y=mean.values,
                    mode="lines+markers",
                    name=escaped(name),
                    line={"color": qualitative.Safe[index % len(qualitative.Safe)], "dash": dash},
                    hovertemplate=f"{escaped(name)}, dose %{{x}}: %{{y:.3f}} {unit}<extra></extra>",
                ),
                1,
                1,
            )
    figure.update_xaxes(title_text=_AXES.get(str(change.attrs.get("what")), "dose"), gridcolor="#e4e7eb")
    figure.update_yaxes(title_text=unit, gridcolor="#e4e7eb", zerolinecolor="#9aa5b1")
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return styled(figure, 400, 620, str(change.attrs.get("note", "")))
