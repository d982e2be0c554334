"""Numbers that are no mean over facts (ratios, shares), with a jackknife interval over facts.

Each fact is left out in turn; the spread of the results gives the standard error (Efron & Stein 1981).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import xarray as xr
from scipy import stats

from subjattn.evidence.contrasts import CONFIDENCE, MIN_FACTS, Interval


Pooled = Callable[[xr.Dataset], float]


def pooled_interval(replicates: Sequence[xr.Dataset], quantity: Pooled) -> Interval | None:
    """A pooled quantity, mean over an arm's replicates, with its interval; None where it is not defined.

    The ends are infinite under 20 facts, and where the quantity is not defined without one of them.

    Args:
        replicates: of one arm: the same facts, measured in each.
        quantity: gives NaN where it is not defined.
    """
    shared = _shared(replicates)
    return _jackknife(lambda some: float(np.mean([quantity(one.isel(fact=some)) for one in shared])), shared)


def pooled_contrast(a: Sequence[xr.Dataset], b: Sequence[xr.Dataset], quantity: Pooled) -> Interval | None:
    """The difference of a pooled quantity between two arms, the same facts left out of both."""

    shared = _shared([*a, *b])
    sides = shared[: len(a)], shared[len(a) :]

    def difference(some: np.ndarray) -> float:
        first, second = (np.mean([quantity(one.isel(fact=some)) for one in arm]) for arm in sides)
        return float(first - second)

    return _jackknife(difference, shared)


def _shared(datasets: Sequence[xr.Dataset]) -> list[xr.Dataset]:
    """The facts that count in all of them, where a coordinate `kept` says which do."""
    kept = [one["kept"].values.astype(bool) for one in datasets if "kept" in one.coords]
    return [one.isel(fact=np.logical_and.reduce(kept)) for one in datasets] if kept else list(datasets)


def _jackknife(value: Callable[[np.ndarray], float], datasets: Sequence[xr.Dataset]) -> Interval | None:
    n = datasets[0].sizes["fact"]
    if n == 0:
        return None
    every = np.arange(n)
    estimate = value(every)
    if not np.isfinite(estimate):
        return None
    left_out = np.array([value(np.delete(every, i)) for i in range(n)]) if n >= MIN_FACTS else np.array([np.nan])
    if not np.isfinite(left_out).all():
        return Interval(estimate, float("-inf"), float("inf"), n)
    error = np.sqrt((n - 1) / n * ((left_out - left_out.mean()) ** 2).sum())
    half = stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * error
    return Interval(estimate, float(estimate - half), float(estimate + half), n)
