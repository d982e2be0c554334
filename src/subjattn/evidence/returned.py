"""What states of one model return of the gap between two: medians over facts, and never one ratio of means."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import interval
from subjattn.evidence.ratios import ratio


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
    try:
        ends = interval(_clustered(by_fact)).ends()
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


def returned_accuracy(found: xr.Dataset | xr.DataArray) -> xr.Dataset:
    """What interventions on the tuned model return of the accuracy that tuning cost (or gained), one by one.

    The share is a difference of means over another, (with the base's states, or scores raised − tuned) / (base −
    tuned), with its interval. Where the interval of the gap holds 0 there is none.

    Args:
        found: from `put_back_accuracy` or `raised_accuracy`; of several replicates its `correct`, with `draw` and
            `seed`.

    Returns:
        A Dataset over `put` or `dose`, all of whose numbers at a place are of the same facts, those with a value in
        every cell there (a prompt may be too short for a placebo): `accuracy` by `cell`; by `patch`, real, placebo or
        random heads, `share` of the gap, `share_low` and `share_high`, NaN where it is not defined, and `right_again`:
        how many of the `n_lost` answers, right by the base and wrong by the tuned model, are right; `n`, answers.
        Attributes `gap`, tuned minus base, and `gap_interval`, of all facts; NaN where they are too few for one.

    Raises:
        BadInput: not from one of them.
    """
    correct = found.get("correct") if isinstance(found, xr.Dataset) else found
    along = next((dim for dim in ("put", "dose") if correct is not None and dim in correct.dims), "")
    if correct is None or not along or not {"fact", "cell"} <= set(correct.dims):
        raise BadInput(
            "this is no accuracy under interventions: give what put_back_accuracy or raised_accuracy returns"
        )
    labels, real = correct[along].values, {"put": "put_back", "dose": "raised"}[along]
    base, tuned = (correct.isel({along: 0}, drop=True).sel(cell=cell, drop=True) for cell in ("base", "tuned"))
    gap = _clustered(tuned - base)
    ends = _ends(gap, (-1.0, 1.0))
    defined = ends[0] > 0 or ends[1] < 0
    dropped = [dim for dim in correct.dims if dim not in (along, "cell")]
    missing = correct.isnull() & correct.notnull().any(dropped)
    correct = correct.where(~missing.any("cell"))
    base, tuned = (correct.sel(cell=cell, drop=True) for cell in ("base", "tuned"))
    lost = (base == 1) & (tuned == 0)
    patches = {real: "real"} | {cell: cell for cell in correct["cell"].values if cell.startswith(("placebo", "random"))}
    shares, again = [], []
    for cell in patches:
        put = [correct.sel({"cell": cell, along: label}, drop=True) for label in labels]
        changes = [one - tuned.sel({along: label}, drop=True) for one, label in zip(put, labels, strict=True)]
        shares.append([_share(_clustered(change), gap) if defined else (np.nan,) * 3 for change in changes])
        each = zip(put, labels, strict=True)
        again.append([int(((one == 1) & lost.sel({along: label}, drop=True)).sum()) for one, label in each])
    table, dims = np.array(shares), ("patch", along)
    return xr.Dataset(
        {
            "accuracy": correct.mean(dropped),
            **{name: (dims, table[..., i]) for i, name in enumerate(("share", "share_low", "share_high"))},
            "right_again": (dims, np.array(again)),
            "n_lost": (along, lost.transpose(along, ...).values.reshape(len(labels), -1).sum(1)),
            "n": (along, base.notnull().transpose(along, ...).values.reshape(len(labels), -1).sum(1)),
        },
        {along: labels, "cell": correct["cell"].values, "patch": list(patches.values())},
        {"gap": float(gap.mean()), "gap_interval": list(ends)},
    )


def _share(change: xr.DataArray, gap: xr.DataArray) -> tuple[float, float, float]:
    """Of the gap that a change of answers returns, with its interval; NaN where it is not defined.

    What single answers can move it by bounds it, so that answers that all stay are no proof that others would.
    """
    change, gap = (array.where(change.notnull()) for array in (change, -gap))
    try:
        values = ratio(change, gap)
    except BadInput:
        return (np.nan,) * 3
    share = float(values.mean())
    most = (1 + 1e-9) * (1 + abs(share)) / abs(float(gap.mean()))
    return share, *interval(values, bounds=(share - most, share + most)).ends()


def _clustered(values: xr.DataArray) -> xr.DataArray:
    """Values with those coordinates alone that say which facts belong together, and replicates."""
    kept = {"fact", "answer", "relation", "draw", "seed"}
    return values.drop_vars([name for name in values.coords if name not in kept])


def _ends(values: xr.DataArray, bounds: tuple[float, float]) -> tuple[float, float]:
    """Of the mean's interval; NaN where there are too few facts for one."""
    try:
        return interval(values, bounds=bounds).ends()
    except BadInput:
        return np.nan, np.nan


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


def accuracy_in_rows(found: xr.Dataset) -> dict[str, Any]:
    """What `returned_accuracy` gives as plain data, None where a number is not defined: `put` holds a row a place."""
    rows = []
    for place in found["put"].values.tolist():
        there = found.sel(put=place)
        row: dict[str, Any] = {"put": place, "n": int(there["n"]), "lost": int(there["n_lost"])}
        for patch, cell in (("real", "put_back"), ("placebo", "placebo")):
            own = there.sel(patch=patch)
            row[patch] = {name: _plain(own[name]) for name in ("share", "share_low", "share_high")}
            row[patch] |= {"accuracy": _plain(there["accuracy"].sel(cell=cell)), "again": int(own["right_again"])}
        rows.append(row)
    models = found["accuracy"].isel(put=int(found["n"].values.argmax()))
    low, high = (None if np.isnan(end) else end for end in found.attrs["gap_interval"])
    about = {
        "n": int(found["n"].max()),
        "lost": int(found["n_lost"].max()),
        "gap": found.attrs["gap"],
        "low": low,
        "high": high,
    }
    return {**about, "base": float(models.sel(cell="base")), "tuned": float(models.sel(cell="tuned")), "put": rows}


def accuracy_gap_in_words(found: Mapping[str, Any]) -> str:
    """Of `accuracy_in_rows`: both models' accuracies, and whether there is a gap to have a share of."""
    low, high = found["low"], found["high"]
    ends = "no interval" if low is None else f"[{low:+.2f}, {high:+.2f}]"
    words = f"are right: base {found['base']:.0%}, tuned {found['tuned']:.0%}; gap, tuned − base: "
    words += f"{found['gap']:+.2f} {ends}"
    if low is None or low <= 0 <= high:
        words += ", which may be nothing: a share of it is not defined"
    return words
