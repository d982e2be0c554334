"""Heatmaps of measures, one panel per arm, as Plotly figures.

What a colour means comes from the array: its unit is the scale's title; values of one sign get a sequential scale
from 0, those of both signs a diverging, colour-blind-safe one centred at 0. One scale holds for all arms of a
figure. Text that comes from data is escaped, since Plotly reads markup in labels.
"""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from subjattn.errors import BadInput
from subjattn.plots.drawing import Drawing, axis, cells, escaped, panels, scale, styled, titled


def plot_attention(
    attention: xr.DataArray, difference: tuple[str, str] | None = None, significant: xr.DataArray | None = None
) -> Drawing:
    """A measure by layer and head, mean over facts, such as attention to the subject; a panel per arm.

    Args:
        attention: `(fact, layer, head)`, with or without `arm`: from `subject_attention`, or one route of
            `knockout(by="head")`.
        difference: two arms; a last panel shows the first minus the second.
        significant: `(layer, head)`, from `significant`: the other cells of the last panel are faded.

    Raises:
        BadInput: other dimensions, no such arm, or an array without a number.
    """
    arms = by_arm(attention, ("fact", "layer", "head"))
    shown = {arm: array.mean("fact").transpose("layer", "head").values for arm, array in arms.items()}
    titles = list(shown)
    if difference is not None:
        missing = [arm for arm in difference if arm not in shown]
        if missing:
            raise BadInput(f"no arm {missing[0]!r} among {', '.join(shown)}")
        titles.append(f"{difference[0]} − {difference[1]}")
    figure = panels(1, len(titles), titles, shared_yaxes=True, horizontal_spacing=0.03)
    at = {"x": cells(attention, "head"), "y": cells(attention, "layer")}
    hover = "layer %{y}, head %{x}: %{z:.3f}<extra></extra>"
    for column, values in enumerate(shown.values(), 1):
        figure.add_trace(go.Heatmap(z=values, **at, coloraxis="coloraxis", hovertemplate=hover), 1, column)
    half = "" if difference is None else "top"
    figure.update_layout(coloraxis=scale(np.stack(list(shown.values())), titled(attention), half))
    if difference is not None:
        delta = shown[difference[0]] - shown[difference[1]]
        figure.add_trace(go.Heatmap(z=delta, **at, coloraxis="coloraxis2", hovertemplate=hover), 1, len(titles))
        figure.update_layout(coloraxis2=scale(delta, "change", "bottom", diverging=True))
        if significant is not None:
            _fade(figure, significant, at, len(titles))
    figure.update_xaxes(**axis(attention, "head"))
    figure.for_each_xaxis(lambda one: one.update(title_text=one.title.text or "head"))
    figure.update_yaxes(**axis(attention, "layer"))
    figure.update_yaxes(title_text="layer", col=1)
    panel = 190 if len(titles) < 6 else 130
    height = 430 + 40 * (significant is not None)
    return styled(figure, height, panel * len(titles) + 200, str(attention.attrs.get("note", "")))


def _fade(figure: Drawing, significant: xr.DataArray, at: dict[str, list], column: int) -> None:
    """Veil cells that are not significant, and say beneath what the others speak of."""
    stands = significant.transpose("layer", "head").values
    veil = [[0, "rgba(255,255,255,0.72)"], [1, "rgba(255,255,255,0.72)"]]
    figure.add_trace(
        go.Heatmap(z=np.where(stands, np.nan, 1.0), **at, colorscale=veil, showscale=False, hoverinfo="skip"), 1, column
    )
    speaks = significant.attrs.get("speaks_of", "")
    figure.update_xaxes(title_text=f"head<br>{int(stands.sum())} of {stands.size} cells stand<br>{speaks}", col=column)


def plot_tokens(tokens: xr.DataArray) -> Drawing:
    """A measure by layer over the tokens of single prompts, such as attention to them; arms side by side.

    Args:
        tokens: `(fact, layer, position)`, with or without `arm`, from `token_attention` or
            `patch_grid(at="position")`. Tokens of the subject carry an asterisk, as in Meng et al. (2022).

    Raises:
        BadInput: other dimensions, no tokens beside the positions, or an array without a number behind its first token.
    """
    arms = by_arm(tokens, ("fact", "layer", "position"))
    if "token" not in tokens.coords:
        raise BadInput("the array does not say which tokens stand at its positions: measure it anew by this version")
    n_facts = tokens.sizes["fact"]
    height = 110 + 300 * n_facts
    figure = panels(
        n_facts,
        len(arms),
        [*arms, *[""] * (n_facts - 1) * len(arms)],
        horizontal_spacing=0.02,
        vertical_spacing=0 if n_facts == 1 else 100 / height,
    )
    for row in range(n_facts):
        labels = _token_labels(tokens.isel(fact=row))
        for column, array in enumerate(arms.values(), 1):
            values = array.isel(fact=row).transpose("layer", "position").values[:, : len(labels)]
            hover = "layer %{y}, position %{x}: %{z:.3f}<extra></extra>"
            trace = go.Heatmap(z=values, y=cells(tokens, "layer"), coloraxis="coloraxis", hovertemplate=hover)
            figure.add_trace(trace, row + 1, column)
            cell = {"row": row + 1, "col": column}
            figure.update_xaxes(tickvals=list(range(len(labels))), ticktext=labels, tickangle=-60, **cell)
            figure.update_yaxes(**axis(tokens, "layer"), showticklabels=column == 1, **cell)
        subject = escaped(str(tokens["subject"].values[row]))
        figure.update_yaxes(title_text=f"<b>{subject}</b><br>layer", row=row + 1, col=1)
    # The first token is a sink of attention that would drown the rest.
    figure.update_layout(coloraxis=scale(tokens.isel(position=slice(1, None)).values, titled(tokens)))
    return styled(figure, height, min(1120, 270 * len(arms) + 160), str(tokens.attrs.get("note", "")))


def by_arm(array: xr.DataArray, dims: tuple[str, ...]) -> dict[str, xr.DataArray]:
    """An array of just these dimensions, with or without `arm`, arm by arm."""
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
    return [escaped(repr(text)[1:-1]) + ("*" if inside else "") for text, inside in marked]
