"""Paired differences of a measure between two arms, with a bootstrap interval over facts.

The unit is the fact: the same facts are measured in both arms, so their difficulty cancels. The
interval says how far the mean would move with other facts; it says nothing about other training
seeds, which one run per arm cannot show.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from scipy import stats

from subjattn.errors import BadInput


CONFIDENCE = 0.95
RESAMPLES = 9_999
MIN_FACTS = 20
"""With fewer facts an interval is too narrow to be believed: verdicts are `undecided`, pooled numbers have none."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval, over `n` facts."""

    estimate: float
    ci_low: float
    ci_high: float
    n: int


def contrast(a: xr.DataArray, b: xr.DataArray, *, seed: int = 0) -> Interval:
    """Mean of `a − b` over facts with its 95 % percentile bootstrap interval.

    Args:
        a: a measure over `fact`, one value each.
        b: the same measure of the same facts in the other arm; their order does not matter.
        seed: of the resampling.

    Raises:
        BadInput: the facts differ, or a value is missing.
    """
    if a.dims != ("fact",) or b.dims != ("fact",):
        raise BadInput(f"a contrast takes one value per fact, not dimensions {a.dims} and {b.dims}: average them first")
    if set(a["fact"].values) != set(b["fact"].values):
        raise BadInput("the two arms were not measured on the same facts")
    first, second = a.values, b.sel(fact=a["fact"]).values
    interval = mean_interval(first - second, seed=seed)
    if interval.ci_low == interval.ci_high and np.isin([first, second], [0, 1]).all():
        # No fact changed sides, which a bootstrap takes for certainty. At 95 % fewer than 3/n of facts do
        # (rule of three).
        low, high = np.clip([interval.estimate - 3 / interval.n, interval.estimate + 3 / interval.n], -1, 1)
        return Interval(interval.estimate, float(low), float(high), interval.n)
    return interval


def mean_interval(values: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean of values over facts with its 95 % percentile bootstrap interval."""
    values = np.asarray(values, float)
    if not np.isfinite(values).all():
        raise BadInput(f"{np.count_nonzero(~np.isfinite(values))} of {len(values)} facts have no finite value")
    if len(values) < 2 or np.ptp(values) == 0:
        mean = float(values.mean())
        return Interval(mean, mean, mean, len(values))
    result = stats.bootstrap(
        (values,),
        np.mean,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(seed),
        batch=max(1, 2_000_000 // len(values)),
    )
    low, high = result.confidence_interval
    return Interval(float(values.mean()), float(low), float(high), len(values))
