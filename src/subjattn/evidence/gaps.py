"""Values that are missing for some facts in some replicates: filled in, and the interval widened for it.

| the measure | what is done |
|---|---|
| has bounds | every gap gets the lowest possible value, then the highest: the interval holds both |
| has none | every gap gets its row's part plus its column's, by least squares; all variances are widened |

The second takes it that values are missing for reasons that have nothing to do with them. More than a fifth missing
is refused either way.
"""

from __future__ import annotations

import numpy as np

from subjattn.errors import BadInput


MOST_MISSING = 0.2
_ROUNDS = 200


def filled(values: np.ndarray, bounds: tuple[float, float] | None) -> list[tuple[np.ndarray, float]]:
    """Tables `(fact, replicate)` without gaps, the first with the best guess, and the share that widens each.

    Raises:
        BadInput: more than a fifth of the values is missing.
    """
    gaps = np.isnan(values)
    missing = float(gaps.mean())
    if not missing:
        return [(values, 0.0)]
    if missing > MOST_MISSING:
        raise BadInput(
            f"{gaps.sum()} of {gaps.size} values are missing, more than {MOST_MISSING:.0%}: measure them, or leave "
            "facts or replicates out"
        )
    guess = _additive(values, gaps)
    if bounds is None:
        return [(guess, missing)]
    return [(guess.clip(*bounds), missing), *((np.where(gaps, end, values), 0.0) for end in bounds)]


def _additive(values: np.ndarray, gaps: np.ndarray) -> np.ndarray:
    """Gaps filled by row + column − grand mean of the filled table, until nothing moves."""
    table = np.where(gaps, np.nanmean(values), values)
    for _ in range(_ROUNDS):
        fit = table.mean(1, keepdims=True) + table.mean(0, keepdims=True) - table.mean()
        new = np.where(gaps, fit, values)
        moved = np.abs(new - table).max()
        table = new
        if moved <= 1e-12 * max(1.0, float(np.abs(table).max())):
            break
    return table
