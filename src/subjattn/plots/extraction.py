"""Extraction rates along the layers, what other facts' answers would have dashed."""

from __future__ import annotations

import plotly.graph_objects as go
import xarray as xr
from plotly.colors import qualitative

from subjattn.plots.drawing import Drawing, cells, escaped, panels, styled
from subjattn.plots.figures import Drawn, Figure
from subjattn.plots.heatmaps import by_arm


_TITLES = {"attn": "attention", "mlp": "MLP"}


def plot_extraction(extracted: xr.DataArray, others: xr.DataArray) -> Drawing:
    """Share of facts whose answer is the likeliest token of a layer's update, a line per arm, a panel per component.

    Args:
        extracted: `extracted` `(fact, layer, component)` of `extraction`, with or without `arm`.
        others: `extracted_others` of the same.

    Raises:
        BadInput: other dimensions.
    """
    components = [str(component) for component in extracted["component"].values]
    figure = panels(1, len(components), [_TITLES[one] for one in components], shared_yaxes=True)
    for array, dash, kind in ((extracted, "solid", ""), (others, "dash", "other facts")):
        for index, (arm, its) in enumerate(by_arm(array, ("fact", "layer", "component")).items()):
            name = ", ".join(filter(None, (arm, kind)))
            for column, component in enumerate(components, 1):
                figure.add_trace(
                    go.Scatter(
                        x=cells(array, "layer"),
                        y=its.sel(component=component).mean("fact").values,
                        mode="lines",
                        name=escaped(name),
                        legendgroup=name,
                        showlegend=column == 1,
                        line={"color": qualitative.Safe[index % len(qualitative.Safe)], "dash": dash},
                        hovertemplate=f"{escaped(name)}, layer %{{x}}: %{{y:.3f}}<extra></extra>",
                    ),
                    1,
                    column,
                )
    figure.update_xaxes(title_text="layer", gridcolor="#e4e7eb", zeroline=False)
    figure.update_yaxes(gridcolor="#e4e7eb", zerolinecolor="#9aa5b1")
    figure.update_yaxes(title_text="share of facts", col=1)
    figure.update_layout(legend={"orientation": "h", "y": -0.25})
    return styled(figure, 400, 420 * len(components) + 100, "")


def _draw(drawn: Drawn) -> Drawing | None:
    extracted, others = drawn.array("extracted"), drawn.array("extracted_others")
    return None if extracted is None or others is None else plot_extraction(extracted, others)


FIGURE = Figure(
    "extraction",
    "In which layers the answer is read out",
    "Share of facts whose answer, right or wrong, is the likeliest token of what attention or the MLP of a layer adds "
    "at the prediction position. Dashed: the answers of the other facts in its place, which is as high where a layer "
    "writes the same answer whoever is asked about.",
    _draw,
)
