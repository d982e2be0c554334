"""Heatmaps of activation patching, by role of position and by head, and of causal tracing.

Shares are of what the swap destroyed. Cells that the way a grid is made decides (`trivial_cells`) carry a cross, and
the scale is of the others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import plotly.graph_objects as go
import xarray as xr

from subjattn.measures.patching import mostly_trivial, recovery
from subjattn.plots.drawing import Drawing, axis, cells, escaped, panels, scale, styled, titled
from subjattn.plots.heatmaps import by_arm


ROLE_LABELS = {
    "before_subject": "before",
    "subject_first": "subject, first",
    "subject_middle": "subject, middle",
    "subject_last": "subject, last",
    "after_subject": "after",
    "prediction": "prediction",
}


@dataclass(frozen=True)
class _Shown:
    """What the colours are: from facts to numbers, and their title, which the direction of patching gives if empty."""

    numbers: Callable[[xr.DataArray], xr.DataArray]
    title: str = ""


_SHARED = _Shown(recovery)


def plot_patching(effect: xr.DataArray) -> Drawing:
    """Share of what the swap destroyed that a patch brings back (noising: destroys), by layer and position role.

    Cells that are decided by the way they are made (`trivial_cells`) carry a cross, and the scale is of the others.

    Args:
        effect: `(fact, layer, role)`, with or without `arm`, from `patch_grid` with `logit_diff` or
            `answer_logprob`.

    Raises:
        BadInput: other dimensions, a metric that is no change, or no cell that could have been otherwise.
    """
    return _by_role(effect, _SHARED)


def plot_trace(effect: xr.DataArray) -> Drawing:
    """What of the answer one clean state restored under noise brings back, mean over facts, by layer and position role.

    Cells that are decided by the way they are made (`trivial_cells`) carry a cross, and the scale is of the others.

    Args:
        effect: `(fact, layer, role)`, with or without `arm`: `indirect_effect` (or `share`) of `trace`.

    Raises:
        BadInput: other dimensions, or no cell that could have been otherwise.
    """
    return _by_role(effect, _Shown(lambda array: array.mean("fact"), titled(effect)))


def _by_role(effect: xr.DataArray, what: _Shown) -> Drawing:
    arms = by_arm(effect, ("fact", "layer", "role"))
    figure = panels(1, len(arms), arms, shared_yaxes=True, horizontal_spacing=0.03)
    labels = [ROLE_LABELS[str(role)] for role in effect["role"].values]
    _fill(figure, {(1, column): array for column, array in enumerate(arms.values(), 1)}, "role", labels, what)
    figure.update_xaxes(tickangle=-50, dtick=1)
    figure.update_yaxes(**axis(effect, "layer"))
    figure.update_yaxes(title_text="layer", col=1)
    return styled(figure, 480, 250 * len(arms) + 140, str(effect.attrs.get("note", "")))


def plot_heads(effect: xr.DataArray) -> Drawing:
    """Share of what the swap destroyed that one head's output brings back (noising: destroys), by layer and head.

    Args:
        effect: `(fact, layer, head)` or `(fact, layer, head, role)`, with or without `arm`, from `patch_grid("z")` with
            `logit_diff` or `answer_logprob`. A row per arm, a panel per role that comes after the first token that
            differs.

    Raises:
        BadInput: other dimensions, a metric that is no change, or no cell that could have been otherwise.
    """
    if "role" not in effect.dims:
        arms = by_arm(effect, ("fact", "layer", "head"))
        figure = panels(1, len(arms), arms, shared_yaxes=True, horizontal_spacing=0.03)
        grid = {(1, column): array for column, array in enumerate(arms.values(), 1)}
    else:
        arms = by_arm(effect, ("fact", "layer", "head", "role"))
        open_ = (effect.notnull() & (effect["reach"] != "before")).any([dim for dim in effect.dims if dim != "role"])
        roles = [str(role) for role in effect["role"].values[open_.values]] or [str(effect["role"].values[0])]
        spacing = {"horizontal_spacing": 0.03, "vertical_spacing": 0.2 / len(arms)}
        figure = panels(len(arms), len(roles), [ROLE_LABELS[role] for role in roles], shared_yaxes=True, **spacing)
        grid = {
            (row, column): array.sel(role=role)
            for row, array in enumerate(arms.values(), 1)
            for column, role in enumerate(roles, 1)
        }
    _fill(figure, grid, "head", cells(effect, "head"))
    rows, columns = max(grid)
    figure.update_xaxes(**axis(effect, "head"))
    figure.update_xaxes(title_text="head", row=rows)
    figure.update_yaxes(**axis(effect, "layer"))
    figure.update_yaxes(title_text="layer", col=1)
    if "role" in effect.dims:
        for row, arm in enumerate(filter(None, arms), 1):
            figure.update_yaxes(title_text=f"<b>{escaped(arm)}</b><br>layer", col=1, row=row)
    return styled(figure, 60 + 370 * rows, 200 * columns + 160, str(effect.attrs.get("note", "")))


def _fill(
    figure: Drawing, grid: dict[tuple[int, int], xr.DataArray], across: str, labels: list, what: _Shown = _SHARED
) -> None:
    """Numbers in every panel, one scale for all, crosses where they could not be otherwise."""
    shares = {at: what.numbers(array).transpose("layer", across) for at, array in grid.items()}
    crosses = {at: mostly_trivial(array).transpose("layer", across).values for at, array in grid.items()}
    first = next(iter(grid.values()))
    noising = first.attrs.get("direction") == "noising"
    shown = np.stack([np.where(crosses[at], np.nan, share) for at, share in shares.items()])
    title = what.title or ("share destroyed" if noising else "share recovered")
    figure.update_layout(coloraxis=scale(shown, title, diverging=True))
    word = "head " if across == "head" else ""
    for (row, column), share in shares.items():
        known = share.notnull().values
        trace = go.Heatmap(
            z=share.values,
            x=labels,
            y=cells(first, "layer"),
            coloraxis="coloraxis",
            text=np.where(crosses[row, column] & known, "×", ""),
            texttemplate="%{text}",
            hovertemplate=f"layer %{{y}}, {word}%{{x}}: %{{z:.2f}} %{{text}}<extra></extra>",
        )
        figure.add_trace(trace, row, column)
