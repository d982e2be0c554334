"""Knock-out along the layers as lines, a panel per route; by head as heatmaps."""

from __future__ import annotations

import html

import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from subjattn.errors import BadInput
from subjattn.plots.heatmaps import DIVERGING, FONT


def plot_knockout(drop: xr.DataArray) -> go.Figure:
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
    unit = str(drop.attrs.get("unit", ""))
    return _heatmaps(arms, unit) if "head" in mean.dims else _lines(arms, unit, mean.sizes["layer"])


def _lines(arms: dict[str, xr.DataArray], unit: str, n_layers: int) -> go.Figure:
    routes = [str(route) for route in next(iter(arms.values()))["route"].values]
    figure = make_subplots(1, len(routes), subplot_titles=routes, shared_yaxes=True, horizontal_spacing=0.04)
    for index, (arm, array) in enumerate(arms.items()):
        for column, route in enumerate(routes, 1):
            figure.add_trace(
                go.Scatter(
                    x=list(range(n_layers)),
                    y=array.sel(route=route).values,
                    name=html.escape(arm),
                    legendgroup=arm,
                    showlegend=column == 1 and bool(arm),
                    line={"color": qualitative.Safe[index % len(qualitative.Safe)]},
                    hovertemplate=f"{html.escape(arm)}, layer %{{x}}: %{{y:.3f}} {unit}<extra></extra>",
                ),
                1,
                column,
            )
    figure.update_xaxes(title_text="layer", gridcolor="#e4e7eb", zeroline=False)
    figure.update_yaxes(gridcolor="#e4e7eb", zerolinecolor="#9aa5b1")
    figure.update_yaxes(title_text=unit, col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return _styled(figure, 360, 420 * len(routes) + 100)


def _heatmaps(arms: dict[str, xr.DataArray], unit: str) -> go.Figure:
    routes = [str(route) for route in next(iter(arms.values()))["route"].values]
    titles = [html.escape(f"{arm}, {route}" if arm else route) for route in routes for arm in arms]
    figure = make_subplots(len(routes), len(arms), subplot_titles=titles, shared_yaxes=True, horizontal_spacing=0.03)
    bound = max(float(abs(array).max()) for array in arms.values()) or 1.0
    for row, route in enumerate(routes, 1):
        for column, array in enumerate(arms.values(), 1):
            values = array.sel(route=route).transpose("layer", "head").values
            hover = f"layer %{{y}}, head %{{x}}: %{{z:.3f}} {unit}<extra></extra>"
            figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), row, column)
    bar = {"title": {"text": unit, "side": "right"}, "thickness": 12}
    figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -bound, "cmax": bound, "colorbar": bar})
    figure.update_xaxes(title_text="head")
    figure.update_yaxes(title_text="layer", col=1)
    return _styled(figure, 400 * len(routes), 230 * len(arms) + 160)


def _styled(figure: go.Figure, height: int, width: int) -> go.Figure:
    margin = {"l": 60, "r": 40, "t": 50, "b": 60}
    figure.update_layout(
        font=FONT, height=height, width=width, margin=margin, plot_bgcolor="white", paper_bgcolor="white"
    )
    return figure
