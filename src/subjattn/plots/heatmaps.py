"""Heatmaps of measures, one panel per arm, as Plotly figures.

What a colour means comes from the array: its unit is the scale's title; values of one sign get a sequential scale
from 0, those of both signs a diverging, colour-blind-safe one centred at 0. One scale holds for all arms of a
figure. Cells of a patching grid that the way it is made decides are left out of it and marked. Text that
comes from data is escaped, since Plotly reads markup in labels.
"""

from __future__ import annotations

import html
from collections.abc import Iterable

import numpy as np
import plotly.graph_objects as go
import xarray as xr
from plotly.subplots import make_subplots

from subjattn.errors import BadInput
from subjattn.measures.patching import mostly_trivial, recovery


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


def plot_attention(
    attention: xr.DataArray, difference: tuple[str, str] | None = None, significant: xr.DataArray | None = None
) -> go.Figure:
    """A measure by layer and head, mean over facts, such as attention to the subject; a panel per arm.

    Args:
        attention: `(fact, layer, head)`, with or without `arm`: from `subject_attention`, or one route of
            `knockout(by="head")`, or `patch_grid("z", at="prediction")`.
        difference: two arms; a last panel shows the first minus the second.
        significant: `(layer, head)`, from `significant`: the other cells of the last panel are faded.

    Raises:
        BadInput: other dimensions, no such arm, or an array without a number.
    """
    arms = _arms(attention, ("fact", "layer", "head"))
    panels = {arm: array.mean("fact").transpose("layer", "head").values for arm, array in arms.items()}
    titles = list(panels)
    if difference is not None:
        missing = [arm for arm in difference if arm not in panels]
        if missing:
            raise BadInput(f"no arm {missing[0]!r} among {', '.join(panels)}")
        titles.append(f"{difference[0]} − {difference[1]}")
    scale = _scale(np.stack(list(panels.values())), _title(attention), 0)
    figure = make_subplots(1, len(titles), subplot_titles=_escaped(titles), shared_yaxes=True, horizontal_spacing=0.03)
    hover = "layer %{y}, head %{x}: %{z:.3f}<extra></extra>"
    for column, values in enumerate(panels.values(), 1):
        figure.add_trace(go.Heatmap(z=values, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    figure.update_layout(coloraxis=scale)
    if difference is not None:
        delta = panels[difference[0]] - panels[difference[1]]
        figure.add_trace(go.Heatmap(z=delta, coloraxis="coloraxis2", hovertemplate=hover), 1, len(titles))
        figure.update_layout(coloraxis2=_diverging(delta, "change", 1))
        if significant is not None:
            _fade(figure, significant, len(titles))
    figure.update_xaxes(dtick=_tick(attention.sizes["head"]))
    figure.for_each_xaxis(lambda axis: axis.update(title_text=axis.title.text or "head"))
    figure.update_yaxes(dtick=_tick(attention.sizes["layer"]))
    figure.update_yaxes(title_text="layer", col=1)
    panel = 190 if len(titles) < 6 else 130
    return _styled(figure, height=430 + 40 * (significant is not None), width=panel * len(titles) + 200)


def _fade(figure: go.Figure, significant: xr.DataArray, column: int) -> None:
    """Veil cells that are not significant, and say beneath what the others speak of."""
    stands = significant.transpose("layer", "head").values
    veil = [[0, "rgba(255,255,255,0.72)"], [1, "rgba(255,255,255,0.72)"]]
    figure.add_trace(
        go.Heatmap(z=np.where(stands, np.nan, 1.0), colorscale=veil, showscale=False, hoverinfo="skip"), 1, column
    )
    speaks = significant.attrs.get("speaks_of", "")
    figure.update_xaxes(title_text=f"head<br>{int(stands.sum())} of {stands.size} cells stand<br>{speaks}", col=column)


def plot_tokens(tokens: xr.DataArray) -> go.Figure:
    """Attention from the prediction position over the tokens of single prompts, arms side by side.

    Args:
        tokens: `(fact, layer, position)`, with or without `arm`, from `token_attention`. Tokens of the
            subject carry an asterisk, as in Meng et al. (2022).

    Raises:
        BadInput: other dimensions, or an array without a number behind its first token.
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
    figure.update_layout(coloraxis=_scale(tokens.isel(position=slice(1, None)).values, _title(tokens), 0))
    return _styled(figure, height=height, width=min(1120, 270 * len(arms) + 160))


def plot_patching(effect: xr.DataArray) -> go.Figure:
    """Share of what the swap destroyed that a patch brings back (noising: destroys), by layer and position role.

    Cells that are decided by the way they are made (`trivial_cells`) carry a cross, and the scale is of the others.

    Args:
        effect: `(fact, layer, role)`, with or without `arm`, from `patch_grid` with `logit_diff` or
            `answer_logprob`.

    Raises:
        BadInput: other dimensions, a metric that is no change, or no cell that could have been otherwise.
    """
    arms = _arms(effect, ("fact", "layer", "role"))
    panels = {arm: recovery(array) for arm, array in arms.items()}
    crosses = {arm: mostly_trivial(array).transpose("layer", "role").values for arm, array in arms.items()}
    open_ = [np.where(crosses[arm], np.nan, share.transpose("layer", "role")) for arm, share in panels.items()]
    noising = effect.attrs.get("direction") == "noising"
    scale = _scale(np.stack(open_), "share destroyed" if noising else "share recovered", 0, diverging=True)
    figure = make_subplots(1, len(panels), subplot_titles=_escaped(panels), shared_yaxes=True, horizontal_spacing=0.03)
    for column, (arm, share) in enumerate(panels.items(), 1):
        figure.add_trace(
            go.Heatmap(
                z=share.transpose("layer", "role").values,
                x=[ROLE_LABELS[role] for role in share["role"].values],
                coloraxis="coloraxis",
                text=np.where(crosses[arm] & share.notnull().transpose("layer", "role").values, "×", ""),
                texttemplate="%{text}",
                hovertemplate="layer %{y}, %{x}: %{z:.2f} %{text}<extra></extra>",
            ),
            1,
            column,
        )
    figure.update_layout(coloraxis=scale)
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


def _title(array: xr.DataArray) -> str:
    """What the colours of an array are in: its unit, or its name where it has none."""
    return html.escape(str(array.attrs.get("unit") or array.name or "value"))


def _scale(values: np.ndarray, title: str, place: int, diverging: bool = False) -> dict[str, object]:
    """Colours that show every value: from 0 where all have one sign, else centred at 0."""
    if not np.isfinite(values).any():
        raise BadInput("the array holds no number that could be drawn: every value is missing or decided beforehand")
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if diverging or low < 0 < high:
        return _diverging(values, title, place)
    colours = SEQUENTIAL if low >= 0 else f"{SEQUENTIAL}_r"
    return {"colorscale": colours, "cmin": min(low, 0), "cmax": max(high, 0), "colorbar": _bar(title, place)}


def _diverging(values: np.ndarray, title: str, place: int) -> dict[str, object]:
    bound = float(np.nanmax(np.abs(values))) or 1.0
    return {"colorscale": DIVERGING, "cmin": -bound, "cmax": bound, "colorbar": _bar(title, place)}


def _bar(title: str, place: int) -> dict[str, object]:
    return {
        "title": {"text": title, "side": "right"},
        "thickness": 12,
        "x": 1.01 + 0.085 * place,
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
