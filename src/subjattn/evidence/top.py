"""The largest cells of a measure as a table, and what being the largest does to their means."""

from __future__ import annotations

import html
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.clusters import MIN_DF, codes_of
from subjattn.evidence.intervals import interval
from subjattn.evidence.squares import cluster_df
from subjattn.measures.patching import mostly_trivial


By = Literal["absolute", "highest", "lowest"]
_REPLICATES = ("draw", "seed")
MOST = 0.5
"""Share of the facts in which a cell has a value at least."""


class Top(pd.DataFrame):
    """A table that prints what has to be known of it (`attrs["notes"]`) beneath."""

    @property
    def _constructor(self) -> type[pd.DataFrame]:
        return Top

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *self.attrs.get("notes", ())])

    def _repr_html_(self) -> str:
        notes = self.attrs.get("notes", ())
        return self.to_html(notebook=True) + "".join(f"<p>{html.escape(note)}</p>" for note in notes)


def top(array: xr.DataArray, n: int = 10, *, by: By = "absolute", split: int | None = None) -> Top:
    """The cells of a measure with the largest means over facts and replicates.

    The largest of many cells are the largest partly by chance, so on the facts they were chosen on their means are too
    large and their intervals say too much. With `split` they are chosen on one half of the facts and measured on the
    other, where neither holds.

    Args:
        array: `(fact, [draw, seed,] …)`, from any measure. Cells of a patching grid that the way it is made decides
            (`patching.trivial_cells` in at least half of the facts) are left out.
        n: how many cells.
        by: `absolute`: the mean's size; `highest` or `lowest`: the mean.
        split: seed of a random halving of the facts; facts of one answer stay together, so that answers chosen on are
            not measured on. None: all facts for both.

    Returns:
        A row a cell, the largest first: a column for each dimension (`layer`, `head`, …), `mean`, `low` and `high` (the
        95 % interval of `sa.interval`; NaN where there is none, and with `split` where the other half has too few
        answers to say anything of answers that were not chosen on), in the array's unit, and `n` facts. `attrs` hold
        `unit`, `n_cells` they were chosen among, `chosen_on` ("the same facts", "other facts", "nothing": all cells are
        there), `split` and `notes`, which are printed beneath the table.

    Raises:
        BadInput: an array without facts or cells, too few facts, or an argument that does not fit.
    """
    array = _by_fact(array)
    cells = [str(dim) for dim in array.dims if dim not in ("fact", *_REPLICATES)]
    if "fact" not in array.dims or not cells:
        raise BadInput(f"top takes (fact, …) and dimensions of cells such as layer and head, not {array.dims}")
    if by not in get_args(By) or n < 1:
        raise BadInput(f"by {by!r} with n {n}: by is one of {', '.join(get_args(By))}, n 1 or more")
    if {"reach", "component"} <= {*array.coords, *array.attrs}:
        array = array.where(~mostly_trivial(array))
    chosen_on = measured_on = array.stack(cell=cells).transpose("cell", "fact", ...).reset_index("cell")
    if split is not None:
        chosen_on, measured_on = halves(chosen_on, split)
    across = [dim for dim in chosen_on.dims if dim != "cell"]
    means, held = chosen_on.mean(across).values, chosen_on.notnull().mean(across).values
    seldom = (held > 0) & ((held < MOST) | ~np.isfinite(means))
    means = np.where(seldom, np.nan, means)
    size = {"absolute": np.abs(means), "highest": means, "lowest": -means}[by]
    order = np.argsort(-np.where(np.isnan(size), -np.inf, size), kind="stable")[: min(n, int((~np.isnan(size)).sum()))]
    if not len(order):
        raise BadInput("no cell has a value")
    few = _few_answers(measured_on) if split is not None else 0
    rows = [_row(measured_on.isel(cell=int(cell)), cells, without_interval=bool(few)) for cell in order]
    notes = [note for *_, own in rows for note in own]
    if few:
        notes.append(f"no intervals: the {few} answers of the other facts are too few to say anything of other answers")
    if seldom.any():
        notes.append(f"{int(seldom.sum())} cells without a value in most facts, or not finite, are left out")
    n_cells = int((~np.isnan(size)).sum())
    chosen = "nothing" if len(order) == n_cells else "the same facts" if split is None else "other facts"
    table = Top([row for row, _ in rows])
    table.attrs = {"unit": array.attrs.get("unit", ""), "n_cells": n_cells, "chosen_on": chosen, "split": split}
    table.attrs["notes"] = [
        *_said_of_choice(chosen, n_cells, chosen_on.sizes["fact"], split),
        *dict.fromkeys(notes),
        *([str(array.attrs["note"])] if array.attrs.get("note") else []),
    ]
    return table


def _by_fact(array: xr.DataArray) -> xr.DataArray:
    """Arrays of a run that hold few of the facts call them by another name."""
    few = {str(name): str(name).removeprefix("few_") for name in (*array.dims, *array.coords)}
    return array.rename({name: plain for name, plain in few.items() if plain != name})


def halves(array: xr.DataArray, seed: int) -> tuple[xr.DataArray, xr.DataArray]:
    """Facts in two random halves, the one to choose on first; those of one answer in one of them."""
    n = array.sizes["fact"]
    groups = codes_of(array["answer"].values) if "answer" in array.coords else np.arange(n)
    if n > 1 and not groups.any():
        raise BadInput(f"all {n} facts have one answer, so no half is independent of the other: give facts of several")
    halves: tuple[list[int], list[int]] = ([], [])
    for group in np.random.default_rng(seed).permutation(int(groups.max()) + 1):
        min(halves, key=len).extend(np.flatnonzero(groups == group).tolist())
    if min(map(len, halves)) < 2:
        raise BadInput(f"{n} facts cannot be halved to choose on some and measure on others: give four or more")
    return array.isel(fact=sorted(halves[0])), array.isel(fact=sorted(halves[1]))


def _few_answers(array: xr.DataArray) -> int:
    """How many answers the facts share, where these are too few for an interval over answers; else 0."""
    codes = codes_of(array["answer"].values) if "answer" in array.coords else np.arange(array.sizes["fact"])
    n = int(codes.max()) + 1
    return n if n < len(codes) and (n == 1 or cluster_df(codes) < MIN_DF) else 0


def _row(values: xr.DataArray, cells: list[str], *, without_interval: bool) -> tuple[dict[str, Any], list[str]]:
    """One cell's row, and what has to be known of its interval."""
    labels = {dim: values[dim].item() for dim in cells}
    plain = values.drop_vars(["cell", *cells], errors="ignore")
    known = int(plain.notnull().any([dim for dim in plain.dims if dim != "fact"]).sum())
    if without_interval:
        return labels | {"mean": float(plain.mean()), "low": np.nan, "high": np.nan, "n": known}, []
    try:
        found = interval(plain)
    except BadInput as error:
        where = ", ".join(f"{dim} {label}" for dim, label in labels.items())
        ends = {"mean": float(plain.mean()), "low": np.nan, "high": np.nan, "n": known}
        return labels | ends, [f"no interval of {where}: {error}"]
    low, high = found.ends()
    return labels | {"mean": found.estimate, "low": low, "high": high, "n": found.n_facts}, list(found.notes)


def _said_of_choice(chosen: str, n_cells: int, n_facts: int, split: int | None) -> list[str]:
    if chosen == "the same facts":
        return [
            f"chosen among {n_cells} cells and measured on the same {n_facts} facts: means are too large and intervals "
            "too sure; split=0 chooses on one half of the facts and measures on the other"
        ]
    if chosen == "other facts":
        return [f"chosen among {n_cells} cells on {n_facts} other facts (split={split})"]
    return []
