"""Which cells of a heat map differ from nothing, when replicates vary too.

A cell's own variance between three replicates is almost no estimate, and the map's pooled one is fooled by noise that
sits in a corner. Each cell gets the largest of its own, the pooled, and an empirical-Bayes value between them (Smyth
2004, limma), with degrees of freedom that count how many independent fields the map holds: replicates move whole
regions at once, and a thousand cells that move together say no more than one. The rule of `squares` then gives each
cell a p-value, and Benjamini & Yekutieli (2001) or Benjamini & Hochberg (1995) say which stand.
docs/statistics.md has the share of maps without any effect in which a cell is shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import xarray as xr
from scipy import special, stats

from subjattn.errors import BadInput
from subjattn.evidence.clusters import Cluster, clusters_of
from subjattn.evidence.intervals import MIN_REPLICATES, Scope
from subjattn.evidence.squares import Squares, cluster_means, mean_squares


ALPHA = 0.05
Correction = Literal["by", "bh"]
"""Benjamini–Yekutieli, near a family-wise guarantee; Benjamini–Hochberg, the false discovery rate."""
_ALIKE = 1e6
"""Prior degrees of freedom that stand for "all cells have one variance"."""


def significant(
    values: xr.DataArray, *, scope: Scope = "training", correction: Correction = "by", cluster: Cluster = None
) -> xr.DataArray:
    """Cells whose mean over facts and replicates differs from 0.

    Args:
        values: a paired difference `(fact, [draw, seed,] …)`; seeds are averaged within draws, the draws of one are
            its seeds.
        scope: `training` takes three replicates or more, else no cell is significant; with `models` replicates are
            averaged and facts alone vary.
        correction: for the number of cells.
        cluster: which facts belong together, as `interval` takes it.

    Returns:
        Booleans over the other dimensions; attributes `scope`, `correction`, `n_facts`, `n_replicates`. Facts and
        replicates without a value in any cell are left out; a cell in which another value is missing is not
        significant.

    Raises:
        BadInput: an array without `fact`, or without cells.
    """
    cells = [str(dim) for dim in values.dims if dim not in ("fact", "draw", "seed")]
    if "fact" not in values.dims or not cells:
        raise BadInput(f"a map takes (fact, draw, seed) and dimensions of cells, not {values.dims}")
    table = _stacked(values, cells)
    known, made = ~np.isnan(table).all((0, 2)), ~np.isnan(table).all((0, 1))
    table, clusterings = table[:, known][:, :, made], clusters_of(values, cluster, known)[0]
    if scope == "models":
        table = table.mean(2, keepdims=True)
    shape = [values.sizes[dim] for dim in cells]
    _, n_facts, n_replicates = table.shape
    if n_facts < 2 or (scope == "training" and n_replicates < MIN_REPLICATES):
        stands = np.zeros(shape, bool)
    else:
        stands = _discoveries(p_values(table, [*clusterings.values()]), correction).reshape(shape)
    coords = {name: of for name, of in values.coords.items() if set(of.dims) <= set(cells)}
    attrs = {"scope": scope, "correction": correction, "n_facts": n_facts, "n_replicates": n_replicates}
    return xr.DataArray(stands, coords, cells, "significant", attrs)


def p_values(table: np.ndarray, clusterings: Sequence[np.ndarray] = ()) -> np.ndarray:
    """Two-sided p-values of the means of `(cell, fact, replicate)` being 0; NaN where a value is missing.

    Args:
        table: of all cells.
        clusterings: numbers of the facts' clusters; the largest p-value of facts and each counts.
    """
    whole = np.isfinite(table).all((1, 2)) & (np.ptp(table, axis=(1, 2)) > 0)
    found = np.full(len(table), np.nan)
    if whole.any():
        values, means = table[whole], table[whole].mean((1, 2))
        every = [mean_squares(values)]
        every += [mean_squares(*cluster_means(values, codes)) for codes in clusterings]
        if table.shape[2] > 1:
            every = [_moderated(squares, values.mean(1)) for squares in every]
        found[whole] = np.max([squares.p_value(means) for squares in every], axis=0)
    return found


def _moderated(squares: Squares, replicates: np.ndarray) -> Squares:
    """With the replicates' variance made safe by what the other cells have; `replicates` is `(cell, replicate)`."""
    own, df = squares.replicates, replicates.shape[1] - 1.0
    centred = replicates - replicates.mean(1, keepdims=True)
    most = df * _fields(centred)
    prior_df, prior = _prior(own, df)
    weight = min(prior_df, max(most - df, 0.0))
    between = (weight * prior + df * own) / (weight + df)
    safe = np.maximum(np.maximum(own, own.mean()), between)
    return Squares(
        squares.facts, safe, squares.interaction, squares.df_facts, df + weight, squares.df_interaction, squares.skew
    )


def _fields(centred: np.ndarray) -> float:
    """How many independent fields the replicates' deviations `(cell, replicate)` amount to.

    Independent cells point in all directions alike, so the mean of their outer products is nearly round; with k fields
    it strays from round as k directions at random do. Counted with cells alike and by their size; the smaller counts.
    """
    cells, r = centred.shape
    norms = (centred**2).sum(1)
    if r < 3 or not norms.any():
        return 1.0
    round_, counts = (np.eye(r) - 1 / r) / (r - 1), []
    for weights in (np.where(norms > 0, 1 / np.where(norms > 0, norms, 1), 0), np.ones(cells)):
        outer = (centred * weights[:, None]).T @ centred
        strays = ((outer / np.trace(outer) - round_) ** 2).sum()
        counts.append((1 - 1 / (r - 1)) / strays if strays > 0 else cells)
    return float(np.clip(min(counts), 1, cells))


def _prior(variances: np.ndarray, df: float) -> tuple[float, float]:
    """Degrees of freedom and scale of what cells' variances are drawn from, by the moments of their logarithms."""
    logs = np.log(np.maximum(variances, np.finfo(float).tiny))
    logs = logs - special.digamma(df / 2) + np.log(df / 2)
    spread = (logs.var(ddof=1) if len(logs) > 1 else 0.0) - special.polygamma(1, df / 2)
    if spread <= special.polygamma(1, _ALIKE / 2):
        return _ALIKE, float(np.exp(logs.mean()))
    prior = 2 * _inverse_trigamma(float(spread))
    return prior, float(np.exp(logs.mean() + special.digamma(prior / 2) - np.log(prior / 2)))


def _inverse_trigamma(value: float) -> float:
    """By Newton's method on the reciprocal, which is nearly linear (Smyth 2004, appendix)."""
    x = 0.5 + 1 / value
    for _ in range(50):
        trigamma = special.polygamma(1, x)
        step = trigamma * (1 - trigamma / value) / special.polygamma(2, x)
        x += step
        if abs(step) < 1e-8 * x:
            break
    return float(x)


def _discoveries(ps: np.ndarray, correction: Correction) -> np.ndarray:
    known = np.isfinite(ps)
    found = np.zeros(len(ps), bool)
    if known.any():
        found[known] = stats.false_discovery_control(ps[known], method=correction) <= ALPHA
    return found


def _stacked(values: xr.DataArray, cells: list[str]) -> np.ndarray:
    """Values as `(cell, fact, replicate)`."""
    missing = [dim for dim in ("draw", "seed") if dim not in values.dims]
    array = values.astype(float).expand_dims(dict.fromkeys(missing, 1))
    array = array.mean("seed", skipna=False) if array.sizes["draw"] > 1 else array.isel(draw=0)
    array = array.transpose(*cells, "fact", ...)
    return array.values.reshape(-1, array.sizes["fact"], array.shape[-1])
