"""Heatmaps of measures, one panel per arm, as Plotly figures.

Shares use one sequential scale across the arms of a figure; differences and effects use a diverging,
colour-blind-safe scale centred at 0. Text that comes from data is escaped, since Plotly reads markup
in labels.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from subjattn.errors import BadInput
from subjattn.measures.patching import recovery


SEQUENTIAL = "Viridis"
DIVERGING = "RdBu_r"
FONT = {"family": "system-ui, -apple-system, 'Segoe UI', sans-serif", "size": 13, "color": "#1f2933"}
ROLE_LABELS = {
    "before_subject": "before",
    "subject_first": "subject, first",
    "subject_middle": "subject, middle",
    "subject_last": "subject, last",
    "after_subject": "after",
    "prediction": "prediction",
}


def plot_attention(attention: xr.DataArray, difference: tuple[str, str] | None = None) -> go.Figure:
    """Attention to the subject by layer and head, mean over facts; a panel per arm.

    Args:
        attention: `(fact, layer, head)`, with or without `arm`, from `subject_attention`.
        difference: two arms; a last panel shows the first minus the second.
    """
    arms = _arms(attention, ("fact", "layer", "head"))
    panels = {arm: array.mean("fact").transpose("layer", "head").values for arm, array in arms.items()}
    titles = list(panels)
    if difference is not None:
        missing = [arm for arm in difference if arm not in panels]
        if missing:
            raise BadInput(f"no arm {missing[0]!r} among {', '.join(panels)}")
        titles.append(f"{difference[0]} − {difference[1]}")
    top = max(float(values.max()) for values in panels.values())
    figure = make_subplots(1, len(titles), subplot_titles=_escaped(titles), shared_yaxes=True, horizontal_spacing=0.03)
    hover = "layer %{y}, head %{x}: %{z:.3f}<extra></extra>"
    for column, values in enumerate(panels.values(), 1):
        figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    figure.update_layout(coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": top, "colorbar": _bar("share", 0)})
    if difference is not None:
        delta = panels[difference[0]] - panels[difference[1]]
        figure.add_trace(go.Heatmap(z=delta, coloraxis="coloraxis2", hovertemplate=hover), 1, len(titles))
        figure.update_layout(coloraxis2=_diverging(delta, "change", 1))
    figure.update_xaxes(title_text="head", dtick=_tick(attention.sizes["head"]))
    figure.update_yaxes(dtick=_tick(attention.sizes["layer"]))
    figure.update_yaxes(title_text="layer", col=1)
    panel = 190 if len(titles) < 6 else 130
    return _styled(figure, height=430, width=panel * len(titles) + 200)


def plot_tokens(tokens: xr.DataArray) -> go.Figure:
    """Attention from the prediction position over the tokens of single prompts, arms side by side.

    Args:
        tokens: `(fact, layer, position)`, with or without `arm`, from `token_attention`. Tokens of the
            subject carry an asterisk, as in Meng et al. (2022).
    """
    arms = _arms(tokens, ("fact", "layer", "position"))
    n_facts = tokens.sizes["fact"]
    height = 110 + 300 * n_facts
    figure = make_subplots(
        n_facts,
        len(arms),
        subplot_titles=_escaped(arms) + [""] * (n_facts - 1) * len(arms),
        horizontal_spacing=0.02,
        vertical_spacing=0 if n_facts == 1 else 100 / height,
    )
    for row in range(n_facts):
        labels = _token_labels(tokens.isel(fact=row))
        for column, array in enumerate(arms.values(), 1):
            values = array.isel(fact=row).transpose("layer", "position").values[:, : len(labels)]
            hover = "layer %{y}, position %{x}: %{z:.3f}<extra></extra>"
            figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), row + 1, column)
            cell = {"row": row + 1, "col": column}
            figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-60, **cell)
            figure.update_yaxes(dtick=_tick(tokens.sizes["layer"]), showticklabels=column == 1, **cell)
        subject = html.escape(str(tokens["subject"].values[row]))
        figure.update_yaxes(title_text=f"<b>{subject}</b><br>layer", row=row + 1, col=1)
    # The first token is a sink that would drown the rest.
    top = float(np.nanmax(tokens.isel(position=slice(1, None)).values))
    figure.update_layout(coloraxis={"colorscale": SEQUENTIAL, "cmin": 0, "cmax": top, "colorbar": _bar("share", 0)})
    return _styled(figure, height=height, width=min(1120, 270 * len(arms) + 160))


def plot_patching(effect: xr.DataArray) -> go.Figure:
    """Share of the destroyed logit difference that a clean state brings back, by layer and position role.

    Args:
        effect: `(fact, layer, role)`, with or without `arm`, from `patch_grid`.
    """
    panels = {arm: recovery(array) for arm, array in _arms(effect, ("fact", "layer", "role")).items()}
    figure = make_subplots(1, len(panels), subplot_titles=_escaped(panels), shared_yaxes=True, horizontal_spacing=0.03)
    for column, share in enumerate(panels.values(), 1):
        figure.add_trace(
            go.Heatmap(
                z=share.transpose("layer", "role").values,
                x=[ROLE_LABELS[role] for role in share["role"].values],
                coloraxis="coloraxis",
                hovertemplate="layer %{y}, %{x}: %{z:.2f}<extra></extra>",
            ),
            1,
            column,
        )
    figure.update_layout(coloraxis={"colorscale": DIVERGING, "cmin": -1, "cmax": 1, "colorbar": _bar("recovery", 0)})
    figure.update_xaxes(tickangle=-50)
    figure.update_yaxes(dtick=_tick(effect.sizes["layer"]))
    figure.update_yaxes(title_text="layer", col=1)
    return _styled(figure, height=480, width=250 * len(panels) + 140)


def _arms(array: xr.DataArray, dims: tuple[str, ...]) -> dict[str, xr.DataArray]:
    missing = set(dims) - set(array.dims)
    extra = set(array.dims) - set(dims) - {"arm"}
    if missing or extra:
        raise BadInput(f"expected dimensions {dims} with or without 'arm', got {array.dims}; select the rest first")
    if "arm" not in array.dims:
        return {str(array.attrs.get("arm", "")): array}
    return {str(arm): array.sel(arm=arm) for arm in array["arm"].values}


def _token_labels(example: xr.DataArray) -> list[str]:
    texts = [str(text) for text in example["token"].values]
    length = max(i for i, text in enumerate(texts) if text) + 1
    marked = zip(texts[:length], example["in_subject"].values, strict=False)
    return [html.escape(repr(text)[1:-1]) + ("*" if inside else "") for text, inside in marked]


def _escaped(texts: Iterable[str]) -> list[str]:
    return [html.escape(text) for text in texts]


def _diverging(values: np.ndarray, title: str, place: int) -> dict[str, object]:
    bound = float(np.nanmax(np.abs(values))) or 1.0
    return {"colorscale": DIVERGING, "cmin": -bound, "cmax": bound, "colorbar": _bar(title, place)}


def _bar(title: str, place: int) -> dict[str, object]:
    return {
        "title": {"text": title, "side": "top"},
        "thickness": 12,
        "x": 1.01 + 0.075 * place,
        "len": 260,
        "lenmode": "pixels",
        **_TOP,
    }


_TOP = {"y": 1, "yanchor": "top"}


def _tick(size: int) -> int:
    return max(1, round(size / 8))


def _styled(figure: go.Figure, height: int, width: int) -> go.Figure:
    figure.update_layout(
        font=FONT,
        height=height,
        width=width,
        margin={"l": 60, "r": 40, "t": 50, "b": 60},
        plot_bgcolor="white",
        paper_bgcolor="white",
    )
    figure.update_annotations(font={**FONT, "size": 14})
    return figure
