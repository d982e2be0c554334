"""The ways in which a table of values may be counted: by facts, by clusters of facts, with values filled in.

Each gives an estimate of the mean and its squares; an interval is as wide as the widest.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from subjattn.evidence.squares import Squares, cluster_means, crossed, mean_squares


FEW_DISCORDANT = 10
"""Fewer facts (clusters) that differ from the others say little of how often others would."""


def cases_of(
    values: np.ndarray, missing: float, clusterings: Mapping[str, np.ndarray], bounds: tuple[float, float] | None
) -> list[tuple[float, Squares]]:
    """The centre, with squares of facts as units and of every clustering."""
    centre = float(values.mean())
    every = [np.arange(len(values)), *clusterings.values()]
    found = [mean_squares(*_units(values, codes, bounds)) for codes in every]
    for i, j in combinations(range(1, len(every)), 2):
        both = np.unique(np.column_stack([every[i], every[j]]), axis=0, return_inverse=True)[1].ravel()
        if both.max() > max(every[i].max(), every[j].max()):
            found.append(crossed(found[i], found[j], mean_squares(*_units(values, both, bounds))))
    return [(centre, _widened(squares, missing, *values.shape)) for squares in found]


def _units(
    values: np.ndarray, own: np.ndarray, bounds: tuple[float, float] | None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Facts, or means of clusters and their shares; with one more at either bound where few differ from the others.

    A cluster more, where most facts are at a bound themselves: the mean is skewed then.
    """
    kinds, counts = np.unique(values, return_counts=True)
    common = kinds[counts.argmax()]
    if bounds is not None and len(np.unique(own[(values != common).any(1)])) < FEW_DISCORDANT:
        size = max(1, round(len(values) / len(np.unique(own)))) if common in bounds else 1
        values = np.vstack([values, *(np.full((size, values.shape[1]), end) for end in bounds)])
        own = np.concatenate([own, np.repeat([own.max() + 1, own.max() + 2], size)])
    return (values, None) if own.max() + 1 == len(own) else cluster_means(values, own)


def _widened(squares: Squares, missing: float, n: int, r: int) -> Squares:
    """What filling in a share of `n` × `r` values leaves out of the squares is put back."""
    if not missing:
        return squares
    free = (n - 1) * (r - 1)
    interaction = squares.interaction * free / (free - missing * n * r)
    extra = interaction * missing / (1 - missing)
    return Squares(
        squares.facts + extra,
        squares.replicates + extra,
        interaction,
        squares.df_facts,
        squares.df_replicates,
        squares.df_interaction,
        squares.skew,
    )
