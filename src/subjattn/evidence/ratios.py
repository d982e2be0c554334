"""Numbers that are no mean over facts, ratios and slopes, as values per fact whose mean they are.

Each fact's value is the number plus what the fact moves it by, to first order, so that `interval` and `contrast`
take such numbers as they take means: with replicates, clusters and all.
"""

from __future__ import annotations

import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import Scope, interval


def ratio(
    numerator: xr.DataArray, denominator: xr.DataArray, *, scope: Scope | None = None, positive: bool = False
) -> xr.DataArray:
    """Values whose mean is the mean of `numerator` over the mean of `denominator`.

    With θ the ratio, x and y a fact's values and ȳ the denominator's mean: θ + (x − θ·y) / ȳ.

    Args:
        numerator: `(fact, draw, seed)`, with or without the last two.
        denominator: of the same facts and replicates. A value missing in one is left out of both.
        scope: in which the denominator has to differ from 0.
        positive: the denominator has to be above 0, as what a share is a share of.

    Raises:
        BadInput: the interval of the denominator's mean holds 0, and the ratio could be anything; or it is negative
            where it must not be.
    """
    both = numerator.notnull() & denominator.notnull()
    x, y = numerator.where(both), denominator.where(both)
    if not both.any():
        raise BadInput("no fact has a value")
    if bool((y == y.max()).where(both, True).all()):
        low = high = float(y.max())
    else:
        low, high = interval(y, scope=scope).ends()
    if low <= 0 <= high:
        raise BadInput(f"what it is a share of may be nothing (95 % interval {low:.3g} to {high:.3g})")
    mean = float(y.mean())
    if positive and mean < 0:
        raise BadInput(f"what it is a share of is negative ({mean:.3g})")
    share = float(x.mean()) / mean
    return share + (x - share * y) / mean


def slope(values: xr.DataArray, on: xr.DataArray) -> xr.DataArray:
    """Values whose mean is near the least-squares slope of `values` on a number that each fact has.

    Residuals are divided by one minus their fact's leverage, as in the jackknife (HC3), which errs to the wide side;
    their mean is put right, so that the slope itself is exact.

    Args:
        values: `(fact, draw, seed)`, with or without the last two.
        on: `(fact,)`, such as the logarithm of popularity.

    Raises:
        BadInput: all facts have the same number, or some lack a number or a value.
    """
    x = on.sel(fact=values["fact"].values).astype(float).drop_vars([name for name in on.coords if name != "fact"])
    if missing := int((x.isnull() | values.isnull().any([dim for dim in values.dims if dim != "fact"])).sum()):
        raise BadInput(f"{missing} facts lack a number or a value: leave them out of both")
    x = x - x.mean()
    spread = float((x**2).sum())
    if not spread > 0:
        raise BadInput("a slope takes facts with a number each, and not all the same")
    n = values.sizes["fact"]
    found = (values * x).sum("fact") / spread
    left = values - values.mean("fact") - found * x
    moved = n * x * left / spread / (1 - 1 / n - x**2 / spread)
    return (found + moved - moved.mean("fact")).transpose(*values.dims)
