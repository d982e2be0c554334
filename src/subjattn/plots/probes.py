"""What probes read, by layer and role: accuracy, and beneath it how far it stands above the control task's."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from subjattn.plots.drawing import Drawing, axis, cells, panels, scale, styled
from subjattn.plots.heatmaps import by_arm, plot_attention
from subjattn.plots.patching import ROLE_LABELS


_DIMS = ("fact", "layer", "role")


def plot_probes(correct: xr.DataArray, selectivity: xr.DataArray | None = None) -> Drawing:
    """Mean accuracy of probes by layer and role, a panel per arm; a second row shows selectivity, centred at 0.

    Args:
        correct: `(fact, layer, role)`, with or without `arm`: `correct` (or `ranked`) of `probe`.
        selectivity: `selectivity`, over the same; None, or no number in it as where no two names share a last token:
            accuracy alone.

    Raises:
        BadInput: other dimensions, or an array without a number.
    """
    if selectivity is not None and bool(selectivity.isnull().all()):
        selectivity = None
    rows = [correct] if selectivity is None else [correct, selectivity]
    arms = list(by_arm(correct, _DIMS))
    spacing = {"horizontal_spacing": 0.04, "vertical_spacing": 0.14}
    titles = [*arms, *[""] * len(arms) * (len(rows) - 1)]
    figure = panels(len(rows), len(arms), titles, shared_yaxes=True, **spacing)
    labels = [ROLE_LABELS[str(role)] for role in correct["role"].values]
    for row, array in enumerate(rows, 1):
        means = [one.mean("fact").transpose("layer", "role").values for one in by_arm(array, _DIMS).values()]
        colours = "coloraxis" if row == 1 else "coloraxis2"
        title = str(array.name or "").removeprefix("probe_").replace("correct", "accuracy")
        half = "" if selectivity is None else ("top", "bottom")[row - 1]
        figure.update_layout({colours: scale(np.stack(means), title, half, diverging=row == 2)})
        for column, values in enumerate(means, 1):
            hover = "layer %{y}, %{x}: %{z:.3f}<extra></extra>"
            trace = go.Heatmap(
                z=values, x=labels, y=cells(array, "layer"), coloraxis=colours, hovertemplate=hover, hoverongaps=False
            )
            figure.add_trace(trace, row, column)
    figure.update_xaxes(tickangle=-50, dtick=1)
    figure.update_yaxes(**axis(correct, "layer"))
    figure.update_yaxes(title_text="layer", col=1)
    width = max(440, 130 + max(150, 70 * len(labels)) * len(arms))
    return styled(figure, 80 + 330 * len(rows), width, str(correct.attrs.get("note", "")))


def plot_probed(correct: xr.DataArray, selectivity: xr.DataArray | None = None) -> Drawing:
    """`plot_probes`; of heads by layer and head, at the subject's last token where that was probed."""
    if "head" not in correct.dims:
        return plot_probes(correct, selectivity)
    roles = correct["role"].values.tolist()
    role = "subject_last" if "subject_last" in roles else roles[0]
    return plot_attention(correct.sel(role=role, drop=True).assign_attrs(note=f"at {ROLE_LABELS[role]}"))
