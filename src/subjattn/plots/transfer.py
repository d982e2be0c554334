"""What states of one model return in another, as heat maps beside their placebos; a bar per part of an update."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from subjattn.errors import BadInput
from subjattn.evidence.intervals import interval
from subjattn.evidence.returned import shares
from subjattn.measures.transfer import PATCHES
from subjattn.plots.drawing import Drawing, axis, cells, escaped, panels, scale, styled, titled
from subjattn.plots.heatmaps import by_arm
from subjattn.plots.patching import ROLE_LABELS


_CROSSED = ("fact", "patch", "state", "late", "layer")
_INK = "#1f2933"
_TITLE = "share returned (median)"


def plot_transfer(crossed: xr.DataArray, into: str | None = None) -> Drawing:
    """Median share of the gap between two models that a state of one returns in the other, by layer, placebo beside it.

    The scale is centred at 0 and ends at 1 at most, where all of the gap is returned; a single cell may lie beyond.

    Args:
        crossed: `(fact, patch, state, late, layer)` and `role` or not: a variable of `transfer`. A dimension `put` of
            several components, and `arm`, are shown too.
        into: whose later layers; None: of both, but by role of the tuned model alone.

    Raises:
        BadInput: other dimensions, no such model, or no fact with a gap.
    """
    by_role = "role" in crossed.dims
    if "put" not in crossed.dims:
        crossed = crossed.expand_dims(put=[str(crossed.attrs.get("component", ""))])
    arms = by_arm(crossed, (*_CROSSED, "put", *(["role"] if by_role else [])))
    base, tuned = map(str, crossed["state"].values)
    if into is not None and into not in (base, tuned):
        raise BadInput(f"into {into!r} is not one of {base}, {tuned}")
    models = [into] if into is not None else [tuned] if by_role else [tuned, base]
    found = {arm: shares(of)["share"].sel(into=models) for arm, of in arms.items()}
    if not any(bool(of.notnull().any()) for of in found.values()):
        raise BadInput("no fact has a gap between the two models: a share of it is not defined")
    figure = _roles(found) if by_role else _components(found)
    values = np.stack([of.values for of in found.values()])
    figure.update_layout(coloraxis=scale(np.clip(values, -1, 1), _TITLE, diverging=True))
    return figure


def _components(found: Mapping[str, xr.DataArray]) -> Drawing:
    """Layers across; a row a component and, beneath, one of its placebo. Panels: whose later layers × arms."""
    first = next(iter(found.values()))
    models, puts, n = first["into"].values.tolist(), first["put"].values.tolist(), len(found)
    titles = [", ".join(filter(None, (arm, f"into {late}"))) for late in models for arm in found]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.12}
    figure = panels(len(models), n, titles, shared_xaxes=True, shared_yaxes=True, **spacing)
    rows = [f"{escaped(str(put))}{part}" for put in puts for part in ("", " ·")]
    labels = [label for put in puts for label in (escaped(str(put)), "<i>placebo</i>")]
    for row, late in enumerate(models, 1):
        for column, of in enumerate(found.values(), 1):
            own = of.sel(into=late).transpose("put", "patch", "layer").sel(patch=list(PATCHES))
            trace = go.Heatmap(
                z=own.values.reshape(len(rows), -1),
                x=cells(of, "layer"),
                y=rows,
                coloraxis="coloraxis",
                customdata=np.broadcast_to(np.array(labels)[:, None], (len(rows), of.sizes["layer"])),
                hovertemplate="%{customdata}, layer %{x}: %{z:.2f}<extra></extra>",
            )
            figure.add_trace(trace, row, column)
    figure.update_yaxes(tickvals=rows, ticktext=labels, autorange="reversed", automargin=True)
    figure.update_xaxes(**axis(first, "layer"))
    figure.update_xaxes(title_text="layer", row=len(models))
    return styled(figure, 90 + len(models) * (40 + 18 * len(rows)), 330 * n + 260)


def _roles(found: Mapping[str, xr.DataArray]) -> Drawing:
    """Roles across, layers up. Panels: arms and components × what is put and its placebo, into each model."""
    first = next(iter(found.values()))
    models, puts = first["into"].values.tolist(), first["put"].values.tolist()
    columns = [(late, patch) for late in models for patch in PATCHES]
    rows = [(arm, put) for arm in found for put in puts]
    titles = [f"into {late}" if patch == PATCHES[0] else patch for late, patch in columns]
    spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.24 / len(rows)}
    figure = panels(len(rows), len(columns), titles, shared_yaxes=True, shared_xaxes=True, **spacing)
    labels = [ROLE_LABELS[str(role)] for role in first["role"].values]
    for row, (arm, put) in enumerate(rows, 1):
        for column, (late, patch) in enumerate(columns, 1):
            values = found[arm].sel(put=put, into=late, patch=patch).transpose("layer", "role").values
            hover = "layer %{y}, %{x}: %{z:.2f}<extra></extra>"
            at = {"x": labels, "y": cells(first, "layer")}
            figure.add_trace(go.Heatmap(z=values, **at, coloraxis="coloraxis", hovertemplate=hover), row, column)
        name = ", ".join(filter(None, (arm, str(put))))
        figure.update_yaxes(title_text=f"<b>{escaped(name)}</b><br>layer", col=1, row=row)
    figure.update_xaxes(dtick=1)
    figure.update_xaxes(tickangle=-50, row=len(rows))
    figure.update_yaxes(**axis(first, "layer"))
    return styled(figure, 120 + 300 * len(rows), 220 * len(columns) + 180)


def plot_parts(share: xr.DataArray) -> Drawing:
    """What each part of an update changes, a bar with its 95 % interval over facts; arms side by side.

    Args:
        share: `(fact, part)`, with or without `arm`: Shapley values from `swap_weights`.

    Raises:
        BadInput: other dimensions, or no fact with a value.
    """
    arms = by_arm(share, ("fact", "part"))
    if not bool(share.notnull().any()):
        raise BadInput("no fact has a value: there is nothing to draw")
    figure, parts = panels(1, 1, [""]), [str(part) for part in share["part"].values]
    for index, (arm, array) in enumerate(arms.items()):
        means = array.mean("fact").sel(part=parts).values
        ends = np.array([_ends(array.sel(part=part, drop=True), mean) for part, mean in zip(parts, means, strict=True)])
        bar = go.Bar(
            x=[escaped(part) for part in parts],
            y=means,
            name=escaped(arm),
            showlegend=bool(arm),
            marker_color=qualitative.Safe[index % len(qualitative.Safe)],
            error_y={"array": ends[:, 1] - means, "arrayminus": means - ends[:, 0], "thickness": 1.5, "color": _INK},
            customdata=ends,
            hovertemplate="%{x}: %{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>",
        )
        figure.add_trace(bar, 1, 1)
    figure.update_xaxes(title_text="part of the update")
    figure.update_yaxes(title_text=titled(share), gridcolor="#e4e7eb", zerolinecolor="#52606d")
    figure.update_layout(barmode="group", bargap=0.35, legend={"orientation": "h", "y": -0.25})
    return styled(figure, 360, 130 + 90 * len(parts) * max(1, len(arms)))


def _ends(values: xr.DataArray, mean: float) -> tuple[float, float]:
    try:
        return interval(values).ends()
    except BadInput:  # too few facts, or all the same
        return float(mean), float(mean)
