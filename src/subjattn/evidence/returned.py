"""What states of one model return of the gap between two: medians over facts, and never one ratio of means."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import interval


def returned(found: xr.Dataset, metric: str = "answer_logprob", smallest_gap: float = 0.1) -> xr.Dataset:
    """What a `transfer` returns of the gap between the two models, at every place.

    A fact's share is what its metric moves towards the model that the state is from, over the gap between the two.
    Where a fact's own gap is small its share is not defined, and a mean of shares is nowhere taken: single states and
    outliers decide it.

    Args:
        found: from `transfer`.
        metric: one of its variables.
        smallest_gap: below which, in the metric's unit, a fact has no share.

    Returns:
        A Dataset over `patch`, `into` (whose later layers) and the places: `share`, the median over facts that have
        one; `share_low` and `share_high`, its quartiles; `between`, the part of these facts that land between the two
        models; `n_defined`; `change` and `gap`, means over all facts in the metric's unit, and `interaction`: how far
        the four cells are from adding up. Shares are NaN where no fact has one; the attribute `gap_interval` is the
        95 % interval of the mean gap over facts, NaN where facts are too few for one.

    Raises:
        BadInput: no such metric, or not from `transfer`.
    """
    if metric not in found or not {"state", "late", "patch"} <= set(found[metric].dims):
        raise BadInput(f"{metric!r} is no metric of a transfer: there are {', '.join(map(str, found.data_vars))}")
    cells = found[metric]
    base, tuned = map(str, cells["state"].values)
    gaps = cells.sel(state=tuned, late=tuned, drop=True) - cells.sel(state=base, late=base, drop=True)
    by_fact = gaps.max([dim for dim in gaps.dims if dim != "fact"])
    clusters = {"fact", "answer", "relation"}
    try:
        ends = interval(by_fact.drop_vars([name for name in by_fact.coords if name not in clusters])).ends()
    except BadInput:
        ends = (np.nan, np.nan)
    about = {"metric": metric, "unit": cells.attrs["unit"], "smallest_gap": smallest_gap, "tuned": tuned}
    about |= {"gap_interval": list(ends), "component": cells.attrs["component"]}
    return shares(cells, smallest_gap).assign_attrs(about)


def shares(cells: xr.DataArray, smallest_gap: float = 0.1) -> xr.Dataset:
    """What `returned` gives, but for the gap's interval, of one variable `(fact, patch, state, late, …)`."""
    base, tuned = map(str, cells["state"].values)
    into = []
    for late, state in ((tuned, base), (base, tuned)):
        own, other, put = (
            cells.sel(state=s, late=m, drop=True) for s, m in ((late, late), (state, state), (state, late))
        )
        gap, change = other - own, put - own
        share = (change / gap).where(abs(gap) >= smallest_gap)
        with warnings.catch_warnings(action="ignore", category=RuntimeWarning):  # where no fact has a share
            low, median, high = share.quantile([0.25, 0.5, 0.75], "fact").transpose("quantile", ...)
        defined = share.notnull()
        inside = ((share >= 0) & (share <= 1)).where(defined)
        one = {"share": median, "share_low": low, "share_high": high, "between": inside.mean("fact")}
        one |= {"n_defined": defined.sum("fact"), "change": change.mean("fact"), "gap": gap.mean("fact")}
        into.append(xr.Dataset({name: array.drop_vars("quantile", errors="ignore") for name, array in one.items()}))
    result = xr.concat(into, xr.DataArray([tuned, base], dims="into", name="into"))
    signs = {(base, base): 1, (tuned, tuned): 1, (base, tuned): -1, (tuned, base): -1}
    crossed = sum(sign * cells.sel(state=state, late=late, drop=True) for (state, late), sign in signs.items())
    return result.assign(interaction=crossed.mean("fact"))  # type: ignore[union-attr]


def in_rows(found: xr.Dataset, dim: str) -> list[dict[str, Any]]:
    """Shares as plain data: a row for each label along `dim`, None where a number is not defined.

    Each has `n`, the facts with a share, and for both models whose later layers are met, `into`, what `shares` gives
    at the place and at its placebo.
    """
    patches = [str(patch) for patch in found["patch"].values]
    names = ("share", "share_low", "share_high", "between", "change")
    rows = []
    for label in found[dim].values.tolist():
        here = found.sel({dim: label})
        into = {
            str(late): {
                patch: {name: _plain(here[name].sel(into=late, patch=patch)) for name in names} for patch in patches
            }
            for late in here["into"].values
        }
        rows.append({dim: label, "n": int(here["n_defined"].sel(patch="real").max()), "into": into})
    return rows


def _plain(number: xr.DataArray) -> float | None:
    return None if np.isnan(value := float(number)) else value
