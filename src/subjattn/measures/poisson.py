"""The slope of a quasi-Poisson regression with an offset, within groups, and what each count moves it by."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq


FARTHEST = 60.0
"""Slopes times the predictor's spread that are looked for; e to this is more than any ratio of counts."""
ONE_END = "only counts at one end of the predictor are above 0: no finite slope fits"


@dataclass(frozen=True)
class Slope:
    """A slope, and what it rests on.

    Attributes:
        slope: rise of the log ratio of count and expected count for one unit of the predictor.
        moved: `(count,)`, by how much each count moves the slope, to first order; residuals are divided by one minus
            their leverage, as in the jackknife (HC3), which errs to the wide side. The sum of squares is the slope's
            variance, whatever the counts' own.
        dispersion: of the counts, in Poisson variances; NaN where there are no degrees of freedom.
    """

    slope: float
    moved: np.ndarray
    dispersion: float


def poisson_slope(counts: np.ndarray, expected: np.ndarray, on: np.ndarray, group: np.ndarray) -> Slope | str:
    """The slope b of log E[count] = a(group) + log expected + b · on.

    The intercepts are profiled out, so that one number is looked for, in which the score falls.

    Args:
        counts: `(count,)`, 0 or more, whole or not.
        expected: `(count,)`, above 0.
        on: `(count,)`, the predictor.
        group: `(count,)`, labels of groups with a level of their own.

    Returns:
        The slope; or, in words, why there is none.
    """
    _, index = np.unique(group, return_inverse=True)
    lowest, highest = (_by_group(one, on, index) for one in (np.minimum, np.maximum))
    if not (highest > lowest).any():
        return "the predictor does not vary"
    given = counts > 0
    if not given.any():
        return "all counts are 0"
    if not ((given & (on > lowest)).any() and (given & (on < highest)).any()):
        return ONE_END
    totals = np.bincount(index, counts)[index]

    def fitted(slope: float) -> np.ndarray:
        weight = expected * np.exp(slope * (on - np.where(slope > 0, highest, lowest)))
        mean: np.ndarray = totals * weight / np.bincount(index, weight)[index]
        return mean

    def score(slope: float) -> float:
        return float(((counts - fitted(slope)) * on).sum())

    unit = float((highest - lowest).max())
    if not score(-FARTHEST / unit) > 0 > score(FARTHEST / unit):
        return ONE_END
    slope = float(brentq(score, -FARTHEST / unit, FARTHEST / unit))
    mean = fitted(slope)
    own = np.bincount(index, mean)[index]
    centred = on - np.divide(np.bincount(index, mean * on)[index], own, out=on.copy(), where=own > 0)
    information = float((mean * centred**2).sum())
    leverage = np.divide(mean, own, out=np.zeros_like(mean), where=own > 0) + mean * centred**2 / information
    counting = (mean > 0) & (np.abs(centred) > 1e-9 * unit)
    if (leverage[counting] > 1 - 1e-9).any():
        return "the slope rests on one count alone"
    moved = np.zeros_like(mean)
    moved[counting] = (centred * (counts - mean) / information)[counting] / (1 - leverage[counting])
    left = int((mean > 0).sum()) - len(np.unique(index[mean > 0])) - 1
    spread = float(((counts - mean)[mean > 0] ** 2 / mean[mean > 0]).sum())
    return Slope(slope, moved, spread / left if left > 0 else float("nan"))


def _by_group(reduce: np.ufunc, values: np.ndarray, index: np.ndarray) -> np.ndarray:
    found = np.full(index.max() + 1, np.inf if reduce is np.minimum else -np.inf)
    reduce.at(found, index, values)
    return found.take(index)
