"""Knock-out along the layers as lines, a panel per route; by head as heatmaps."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from subjattn.errors import BadInput
from subjattn.plots.drawing import Drawing, axis, cells, escaped, panels, scale, styled


def plot_knockout(drop: xr.DataArray) -> Drawing:
    """Mean fall of the answer when a route is blocked in one layer, window or head at a time.

    Args:
        drop: `(fact, route, layer[, head])`, with or without `arm`, from `knockout(by=…)`.

    Raises:
        BadInput: the array has no layers, or dimensions that nothing here shows.
    """
    if extra := {"route", "layer"} ^ (set(map(str, drop.dims)) - {"arm", "fact", "few_fact", "head"}):
        raise BadInput(f"a figure of knock-outs needs (fact, route, layer[, head]), got {drop.dims} ({sorted(extra)})")
    fact = next(str(dim) for dim in drop.dims if str(dim) in ("fact", "few_fact"))
    mean = drop.mean(fact)
    arms = {str(arm): mean.sel(arm=arm) for arm in mean["arm"].values} if "arm" in mean.dims else {"": mean}
    figure = _heatmaps(arms, drop) if "head" in mean.dims else _lines(arms, drop)
    rows = drop.sizes["route"]
    height, width = (60 + 340 * rows, 230 * len(arms) + 160) if "head" in mean.dims else (360, 420 * rows + 100)
    return styled(figure, height, width, str(drop.attrs.get("note", "")))


def _lines(arms: dict[str, xr.DataArray], drop: xr.DataArray) -> Drawing:
    routes, unit = [str(route) for route in drop["route"].values], escaped(str(drop.attrs.get("unit", "")))
    figure = panels(1, len(routes), routes, shared_yaxes=True, horizontal_spacing=0.04)
    for index, (arm, array) in enumerate(arms.items()):
        for column, route in enumerate(routes, 1):
            figure.add_trace(
                go.Scatter(
                    x=cells(drop, "layer"),
                    y=array.sel(route=route).values,
                    mode="lines" if drop.sizes["layer"] > 1 else "markers",
                    name=escaped(arm),
                    legendgroup=arm,
                    showlegend=column == 1 and bool(arm),
                    line={"color": qualitative.Safe[index % len(qualitative.Safe)]},
                    hovertemplate=f"{escaped(arm)}, layer %{{x}}: %{{y:.3f}} {unit}<extra></extra>",
                ),
                1,
                column,
            )
    figure.update_xaxes(title_text="layer", gridcolor="#e4e7eb", zeroline=False)
    figure.update_yaxes(gridcolor="#e4e7eb", zerolinecolor="#9aa5b1")
    figure.update_yaxes(title_text=unit, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return figure


def _heatmaps(arms: dict[str, xr.DataArray], drop: xr.DataArray) -> Drawing:
    routes, unit = [str(route) for route in drop["route"].values], escaped(str(drop.attrs.get("unit", "")))
    titles = [f"{arm}, {route}" if arm else route for route in routes for arm in arms]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.24 / len(routes)}
    figure = panels(len(routes), len(arms), titles, shared_yaxes=True, **spacing)
    hover = f"layer %{{y}}, head %{{x}}: %{{z:.3f}} {unit}<extra></extra>"
    for row, route in enumerate(routes, 1):
        for column, array in enumerate(arms.values(), 1):
            values = array.sel(route=route).transpose("layer", "head").values
            at = {"x": cells(drop, "head"), "y": cells(drop, "layer")}
            figure.add_trace(go.Heatmap(z=values, **at, coloraxis="coloraxis", hovertemplate=hover), row, column)
    values = np.stack([array.values for array in arms.values()])
    figure.update_layout(coloraxis=scale(values, unit, diverging=True))
    figure.update_xaxes(**axis(drop, "head"))
    figure.update_xaxes(title_text="head", row=len(routes))
    figure.update_yaxes(**axis(drop, "layer"))
    figure.update_yaxes(title_text="layer", col=1)
    return figure
