"""The mean of a measure, or of its difference between two arms, over facts and replicates, with its interval.

What an interval speaks of is its *scope*. "These two models": the models are given, other facts might have been
asked. "This way of training": other facts might have been asked, and the models might have been trained on other
draws of their facts or from other seeds; this needs replicates. `squares` has the rule, docs/statistics.md how often
the intervals hold what they should.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import xarray as xr
from scipy import stats

from subjattn.errors import BadInput
from subjattn.evidence.cases import cases_of
from subjattn.evidence.clusters import Cluster, clusters_of
from subjattn.evidence.gaps import filled
from subjattn.evidence.squares import Squares


CONFIDENCE = 0.95
MIN_FACTS = 20
"""With fewer facts an interval rests on few values: verdicts are `undecided`."""
MIN_REPLICATES = 3
"""With fewer, a statement about a way of training is a screen and no verdict."""
FAMILY_REPLICATES = 5
"""Advised where many claims are tested together."""
ENOUGH_REPLICATES = 8
SKEWED = 0.35
"""From this skewness of a mean on its interval is warned of."""
_TRAINING = "this way of training"
Scope = Literal["models", "training"]


@dataclass(frozen=True, repr=False)
class Interval:
    """An estimate and what it rests on.

    Attributes:
        estimate: the mean over facts and replicates.
        scope: what the interval speaks of, in words.
        n_facts, n_replicates: that it rests on; replicates are draws, or the seeds of one draw.
        kind: `draws` or `seeds`; None without replicates.
        variance_shares: of the estimate's variance, by `facts`, `draws`, `seeds` and `interaction`.
        n_undefined: facts without a value anywhere, left out.
        notes: what a reader has to know.
        cases: an estimate and its squares for every clustering, and every way to fill gaps.
        bounds: of the mean, where the measure has any.
    """

    estimate: float
    scope: str
    n_facts: int
    n_replicates: int
    kind: str | None
    variance_shares: Mapping[str, float]
    n_undefined: int
    notes: tuple[str, ...]
    cases: tuple[tuple[float, Squares], ...]
    bounds: tuple[float, float] = (-math.inf, math.inf)

    def __repr__(self) -> str:
        low, high = self.ends()
        many = f" × {self.n_replicates} {self.kind}" if self.kind else ""
        return f"<{self.estimate:+.4g} [{low:+.4g}, {high:+.4g}] at 95 %, {self.scope}: {self.n_facts} facts{many}>"

    def ends(self, confidence: float = CONFIDENCE) -> tuple[float, float]:
        """Of the interval at this confidence: the widest of all cases."""
        reached = [(centre, *squares.reach(confidence)) for centre, squares in self.cases]
        low = min(float(centre - down) for centre, down, _ in reached)
        high = max(float(centre + up) for centre, _, up in reached)
        return max(low, self.bounds[0]), min(high, self.bounds[1])

    def p_value(self, value: float = 0.0) -> float:
        """Two-sided, of the mean being `value`: the largest of all cases."""
        centres = [centre for centre, _ in self.cases]
        if min(centres) <= value <= max(centres):
            return 1.0
        return max(float(squares.p_value(centre - value)) for centre, squares in self.cases)

    @property
    def ci_low(self) -> float:
        return self.ends()[0]

    @property
    def ci_high(self) -> float:
        return self.ends()[1]

    @property
    def drawn(self) -> bool:
        """Whether it speaks of a way of training, and not of the models there are."""
        return self.scope.startswith(_TRAINING)

    @property
    def squares(self) -> Squares:
        """Those of the widest case."""
        return max((squares for _, squares in self.cases), key=lambda squares: float(sum(squares.reach())))

    @property
    def df(self) -> float:
        """Degrees of freedom of the estimate's variance."""
        return float(self.squares.total[1])

    @property
    def variances(self) -> dict[str, float]:
        """Of one value: between `facts`, between `replicates`, and of their `interaction` (with what else varies).

        `clusters`: what clusters of facts add to the variance of the mean, which more facts of the same clusters do not
        lower; `clusters_df`: its degrees of freedom.
        """
        alone, widest = self.cases[0][1], self.squares
        a, b, e = _parts(alone)
        f, r = self.n_facts, self.n_replicates
        return {
            "facts": a * f,
            "replicates": b * r,
            "interaction": e * f * r,
            "clusters": max(0.0, _parts(widest)[0] - a),
            "clusters_df": widest.df_facts,
        }

    def to_dict(self) -> dict[str, Any]:
        """As plain data for JSON; ends and numbers that are not finite as None."""
        low, high = self.ends()
        found = {
            "estimate": self.estimate,
            "ci_low": low,
            "ci_high": high,
            "p_value": self.p_value(),
            "df": self.df,
            "scope": self.scope,
            "n_facts": self.n_facts,
            "n_replicates": self.n_replicates,
            "replicates_are": self.kind,
            "variance_shares": dict(self.variance_shares),
            "variances": self.variances,
            "notes": list(self.notes),
        }
        if self.n_undefined:
            found["n_undefined"] = self.n_undefined
        return {name: None if isinstance(of, float) and not np.isfinite(of) else of for name, of in found.items()}


def interval(
    values: xr.DataArray,
    *,
    scope: Scope | None = None,
    cluster: Cluster = None,
    bounds: tuple[float, float] | None = None,
    models: int = 1,
) -> Interval:
    """The mean of a measure, or of a paired difference, with its interval over facts and replicates.

    Facts and replicates are crossed and both random. With draws and seeds both, seeds are averaged within draws and
    draws are the replicates; with one draw, its seeds are, and the interval speaks of training on these facts.

    Args:
        values: `(fact)`, `(fact, draw)`, `(fact, seed)` or `(fact, draw, seed)`. NaN: a fact without any value is
            left out and counted; a replicate without any value is lost; single gaps widen the interval (`gaps`).
        scope: `models`: the replicates there are, are given; `training`: others might have been trained; None:
            `training` where there are replicates.
        cluster: which facts belong together; see `clusters.clusters_of`.
        bounds: between which values can lie. Where fewer than ten facts (clusters) differ from the others, two more
            at the bounds widen the interval, since no change among n facts is no proof of none. Found by itself where
            all values are 0 or 1 and both occur.
        models: how many models the values compare, for the scope in words.

    Returns:
        A 95 % interval; see `Interval`. The rule's coverage is in docs/statistics.md.

    Raises:
        BadInput: fewer than two facts, other dimensions, all values the same without `bounds`, more than a fifth of
            the values missing, or `training` without replicates.
    """
    array = _checked(values)
    table, lost, undefined = _table(array)
    table = table[~undefined]
    n, r = table.shape[0], table.shape[1] * table.shape[2]
    drawn = scope == "training" or (scope is None and r > 1)
    if n < 2:
        raise BadInput(f"{n} of {len(undefined)} facts have a value: an interval takes at least two")
    if drawn and r < 2:
        raise BadInput(
            "a statement about a way of training needs replicates, and there is one: train more, or take scope='models'"
        )
    bounds = bounds or _binary(table)
    if bounds is not None and not (bounds[0] <= np.nanmin(table) and np.nanmax(table) <= bounds[1]):
        raise BadInput(f"values from {np.nanmin(table):g} to {np.nanmax(table):g} lie outside of bounds {bounds}")
    clusterings, notes = clusters_of(array, cluster, ~undefined)
    kind = None if r == 1 else "draws" if table.shape[1] > 1 else "seeds"
    fillings = filled(_replicates(table), bounds)
    if not drawn:
        fillings = [(one.mean(1, keepdims=True), 0.0) for one, _ in fillings]
    cases = [case for one, share in fillings for case in cases_of(one, share, clusterings, bounds)]
    rounding = 1e-12 * float(np.nanmax(np.abs(table)))
    if all(float(sum(squares.reach())) <= rounding for _, squares in cases):
        raise BadInput(
            f"every one of the {n} facts has the value {table.flat[0]:g}, which says nothing of how much others would "
            "vary: give bounds, if the measure has any"
        )
    notes += _counted(table, lost, kind if drawn else None) + warnings_of(fillings[0][0], cases, bounds)
    found = Interval(
        estimate=float(fillings[0][0].mean()),
        scope=in_words(drawn, kind, models),
        n_facts=n,
        n_replicates=_replicates(table).shape[1],
        kind=kind,
        variance_shares={},
        n_undefined=int(undefined.sum()),
        notes=tuple(notes),
        cases=tuple(cases),
        bounds=bounds or (-math.inf, math.inf),
    )
    return _with_shares(found, table, drawn)


def contrast(
    a: xr.DataArray,
    b: xr.DataArray,
    *,
    scope: Scope | None = None,
    cluster: Cluster = None,
    bounds: tuple[float, float] | None = None,
) -> Interval:
    """Mean of `a − b` over facts and replicates, with its interval.

    Arms are paired fact by fact and replicate by replicate; an arm without `draw` or `seed` (a model that is not
    trained here) counts the same in all replicates of the other.

    Args:
        a: a measure of one arm, as `interval` takes it.
        b: the same measure of the same facts in the other arm, in any order.
        scope: as `interval` takes it; so too `cluster`, by coordinates of `a`.
        bounds: of the measure in one arm.

    Raises:
        BadInput: the facts differ, or as `interval`.
    """
    a, b = _checked(a), _checked(b)
    bounds = bounds or _binary(np.concatenate([a.values.ravel(), b.values.ravel()]))
    across = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    return interval(difference(a, b), scope=scope, cluster=cluster, bounds=across, models=2)


def difference(a: xr.DataArray, b: xr.DataArray) -> xr.DataArray:
    """`a − b`, fact by fact and replicate by replicate, with `a`'s coordinates; missing where either is.

    Raises:
        BadInput: the facts differ, or unnamed replicates in number.
    """
    if set(a["fact"].values) != set(b["fact"].values):
        raise BadInput("the two arms were not measured on the same facts")
    own = {name: of for name, of in a.coords.items() if of.dims == ("fact",)}
    b = b.drop_vars([name for name in b.coords if name not in b.dims]).sel(fact=a["fact"].values)
    a = a.drop_vars([name for name in a.coords if name not in a.dims])
    try:
        first, second = xr.align(a, b, join="outer", exclude=["fact"])
    except ValueError:
        raise BadInput(f"the arms have other numbers of replicates, {dict(a.sizes)} and {dict(b.sizes)}") from None
    return (first - second).assign_coords(own)


def _checked(values: xr.DataArray) -> xr.DataArray:
    extra = set(values.dims) - {"fact", "draw", "seed"}
    if extra or "fact" not in values.dims:
        raise BadInput(
            f"an interval takes (fact, draw, seed), with or without the last two, not {values.dims}: average the rest "
            "first"
        )
    if len(set(values["fact"].values)) < values.sizes["fact"]:
        raise BadInput("a fact stands there twice: every fact takes part once")
    if np.isinf(array := values.astype(float)).any():
        raise BadInput(f"{int(np.isinf(array).sum())} values are infinite: no mean can be had of them")
    return array


def _table(array: xr.DataArray) -> tuple[np.ndarray, int, np.ndarray]:
    """Values `(fact, draw, seed)` without lost replicates, how many are lost, and which facts have no value."""
    missing = [dim for dim in ("draw", "seed") if dim not in array.dims]
    values = array.expand_dims(dict.fromkeys(missing, 1)).transpose("fact", "draw", "seed").values
    gone = np.isnan(values).all(0)
    if gone.all():
        raise BadInput("no fact has a value")
    if gone.any() and not (gone.all(0) | gone.all(1)[:, None])[gone].all():
        values = values[:, ~gone.any(1)]  # a draw without one of its seeds would weigh its others more
        if not values.size:
            raise BadInput("every draw lacks one of its seeds: take them out of the array")
    else:
        values = values[:, ~gone.all(1)][:, :, ~gone.all(0)]
    return values, int(gone.size - values.shape[1] * values.shape[2]), np.isnan(values).all((1, 2))


def _replicates(table: np.ndarray) -> np.ndarray:
    """Values `(fact, replicate)`: seeds averaged within draws, or the seeds of one draw; a gap where one is."""
    return table[:, 0] if table.shape[1] == 1 else table.mean(2)


def _binary(values: np.ndarray) -> tuple[float, float] | None:
    """The bounds 0 and 1 where all values are one of them and both occur."""
    known = values[~np.isnan(values)]
    return (0.0, 1.0) if set(np.unique(known)) == {0.0, 1.0} else None


def _counted(table: np.ndarray, lost: int, drawn: str | None) -> list[str]:
    """What is missing from a table `(fact, draw, seed)`, and what it is too small for."""
    n, r, gaps = len(table), table.shape[1] * table.shape[2], int(np.isnan(table).sum())
    notes = [f"{lost} of {lost + r} replicates are lost"] if lost else []
    if gaps:
        assumed = "the interval assumes that this has nothing to do with what they would be"
        notes.append(f"{gaps} values of {table.size} are missing; {assumed}")
    notes += [f"{n} facts, where {MIN_FACTS} are needed for a verdict"] if n < MIN_FACTS else []
    if drawn and _replicates(table).shape[1] < MIN_REPLICATES:
        notes.append(f"two {drawn} are a screen: {MIN_REPLICATES} are needed for a verdict")
    return notes


def warnings_of(
    values: np.ndarray, cases: list[tuple[float, Squares]], bounds: tuple[float, float] | None
) -> list[str]:
    """Warnings where intervals hold the truth less often than they say: the last rows of docs/statistics.md's table."""
    widest = max((squares for _, squares in cases), key=lambda squares: float(sum(squares.reach())))
    notes = []
    if abs(float(widest.skew)) > SKEWED:
        notes.append("a few facts or clusters far from the others carry the mean")
    replicates, mean = values.mean(0), float(values.mean())
    if len(replicates) >= MIN_REPLICATES and widest.replicates > widest.facts:
        near = bounds is not None and min(mean - bounds[0], bounds[1] - mean) < 0.1 * (bounds[1] - bounds[0])
        if near or abs(float(stats.skew(replicates))) > 1:
            notes.append("replicates look skewed, of which so few tell little")
        elif len(replicates) < ENOUGH_REPLICATES:
            notes.append(
                f"most of the uncertainty is between {len(replicates)} replicates: were they skewed, few would show it"
            )
    return notes


def in_words(drawn: bool, kind: str | None, models: int) -> str:
    """What an interval speaks of."""
    if drawn:
        return _TRAINING + (" on these facts" if kind == "seeds" else "")
    return "these models" if kind else {1: "this model", 2: "these two models"}.get(models, "these models")


def _parts(squares: Squares) -> tuple[float, float, float]:
    """The variance of the mean due to facts, replicates and their interaction."""
    a, b, e = (float(one) for one in (squares.facts, squares.replicates, squares.interaction))
    return max(0.0, a - e), max(0.0, b - e), e


def _with_shares(found: Interval, table: np.ndarray, drawn: bool) -> Interval:
    """The same with `variance_shares`: what replicates carry is parted into draws and seeds where both vary."""
    facts, replicates, interaction = _parts(found.squares)
    seeds = 0.0
    if drawn and min(table.shape[1:]) > 1:
        d, s = table.shape[1:]
        own = table - table.mean(2, keepdims=True)
        between = np.nansum(np.nanmean(own, 0) ** 2) / (d * (s - 1))
        within = np.nansum((own - np.nanmean(own, 0)) ** 2) / (len(own) - 1) / (d * (s - 1))
        seeds = min(replicates, max(0.0, float(between - within / len(own))) / (d * s))
    parts = {"facts": facts, "draws": replicates - seeds, "seeds": seeds, "interaction": interaction}
    if found.kind == "seeds":
        parts |= {"draws": 0.0, "seeds": replicates}
    total = sum(parts.values()) or 1.0
    shares = {name: of / total for name, of in parts.items()}
    return replace(found, variance_shares=shares)
