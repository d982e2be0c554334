"""Numbers of a whole set of facts as one value a fact, so that they get intervals and pairs like any other."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def pseudo_values(statistic: Callable[[np.ndarray], float], n: int) -> np.ndarray:
    """Jackknife pseudo-values of a pooled number (Tukey 1958): n · all − (n − 1) · all but one, a value a fact.

    Their mean is the number with its bias of order 1/n taken off, and their scatter its standard error.

    Args:
        statistic: from indices of facts to the number; NaN where it is not defined.
        n: facts.

    Returns:
        `(n,)`; NaN throughout where the number is not defined with all facts, or without one of them.
    """
    every = np.arange(n)
    whole = statistic(every)
    without = np.array([statistic(np.delete(every, i)) for i in every]) if n > 1 else np.full(n, np.nan)
    return n * whole - (n - 1) * without if np.isfinite(without).all() else np.full(n, np.nan)
