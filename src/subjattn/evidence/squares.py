"""Facts and replicates crossed: mean squares, and the interval they give for the mean over both.

A value is known for every fact f and replicate k, both drawn at random. The variance of the grand mean has
three parts, each estimated by a mean square over the number of values: A (facts), B (replicates) and
E (their interaction, which A and B hold too). With V = max(A, B, A + B − E) and Satterthwaite's degrees of
freedom for it, the half-width is the largest of t·√V, t·√A and t·√B: never narrower than facts alone or
replicates alone would give. Plain Satterthwaite (1946) is too narrow with few replicates, since a small B by
chance raises the degrees of freedom and shrinks V at once; docs/statistics.md has the measured coverage of both.

Means of skewed values miss on one side. That side's end moves by what Edgeworth's expansion says of a studentised mean
with the skewness seen (Hall 1992, sec. 2.6): t·√V becomes (t + κ(1 + 2t²)/6)·√V. The other end stays, which errs to the
wide side. Of replicates there are too few to see how skewed they are.

Facts may come in clusters of unequal size; A and E are then sums over clusters with the correction CR2 and its
degrees of freedom (Bell & McCaffrey 2002). Everything here works on stacks of such tables at once.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Squares:
    """Estimates of the variance of the grand mean, and their degrees of freedom.

    Attributes:
        facts: A; `replicates`: B; `interaction`: E. Arrays of one shape; B and E are 0 where there is one replicate,
            or where replicates are given and not drawn.
        df_facts: of A, and so on; 0 where there is none.
        skew: κ, the skewness of the mean over facts.
    """

    facts: np.ndarray
    replicates: np.ndarray
    interaction: np.ndarray
    df_facts: float
    df_replicates: float | np.ndarray = 0.0
    df_interaction: float = 0.0
    skew: np.ndarray | float = 0.0

    @property
    def total(self) -> tuple[np.ndarray, np.ndarray]:
        """V and its degrees of freedom."""
        a, b, e = self.facts, self.replicates, self.interaction
        total = np.maximum(np.maximum(a, b), a + b - e)
        parts = [(a, self.df_facts), (b, self.df_replicates), (e, self.df_interaction)]
        spread = sum(part**2 / np.maximum(df, 1e-12) for part, df in parts if np.any(df))
        with np.errstate(divide="ignore", invalid="ignore"):
            df = np.where(total > 0, total**2 / spread, self.df_facts)
        return total, df

    def reach(self, confidence: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
        """How far the interval goes below the mean, and above it."""
        down: list[np.ndarray] = []
        up: list[np.ndarray] = []
        for square, df, skew in self._tested():
            t = stats.t.ppf((1 + confidence) / 2, df)
            for ends, kappa in ((down, -skew), (up, skew)):
                ends.append((t + np.maximum(kappa, 0) * (1 + 2 * t**2) / 6) * np.sqrt(square))
        return np.max(down, axis=0), np.max(up, axis=0)

    def p_value(self, distance: np.ndarray | float) -> np.ndarray:
        """Two-sided, of a mean that lies this far above the value in question; it agrees with `reach`."""
        found = []
        for square, df, skew in self._tested():
            with np.errstate(divide="ignore", invalid="ignore"):
                away = np.abs(distance) / np.sqrt(square)
                t = _unskewed(away, np.maximum(-np.sign(distance) * skew, 0))
            found.append(np.where(square > 0, np.where(t > 0, 2 * stats.t.sf(t, df), 1.0), 0.0))
        return np.where(np.abs(distance) > 0, np.max(found, axis=0), 1.0)

    def _tested(self) -> list[tuple[np.ndarray, np.ndarray | float, np.ndarray | float]]:
        """Variances of which each alone must not say more: the total, facts, replicates."""
        total, df = self.total
        with np.errstate(divide="ignore", invalid="ignore"):
            skew = np.where(total > 0, self.skew * np.where(total > 0, self.facts / total, 0) ** 1.5, 0.0)
        alone = [(self.facts, self.df_facts, self.skew), (self.replicates, self.df_replicates, 0.0)]
        return [(total, df, skew), *(one for one in alone if np.any(one[1]))]


def _unskewed(away: np.ndarray, kappa: np.ndarray) -> np.ndarray:
    """The t for which t + κ(1 + 2t²)/6 is `away`."""
    a = kappa / 3
    with np.errstate(divide="ignore", invalid="ignore"):
        solved = (np.sqrt(np.maximum(1 + 4 * a * (away - kappa / 6), 0)) - 1) / (2 * a)
    return np.asarray(np.where(a > 1e-9, solved, away))


def mean_squares(values: np.ndarray, weights: np.ndarray | None = None) -> Squares:
    """Mean squares of tables `(…, fact, replicate)`; with `weights`, rows are means of clusters of facts.

    Args:
        values: without gaps.
        weights: each row's share of the facts; none: equal ones.
    """
    n, r = values.shape[-2:]
    w = np.full(n, 1 / n) if weights is None else weights
    scale = (w**2 / (1 - w))[:, None]
    columns = (w[:, None] * values).sum(-2, keepdims=True)
    mean = columns.mean(-1, keepdims=True)
    rows = values.mean(-1, keepdims=True)
    facts = (scale * (rows - mean) ** 2).sum((-2, -1))
    df, skew = _bell_mccaffrey(w), _skew(w[:, None] * (rows - mean))
    if r == 1:
        return Squares(facts, np.zeros_like(facts), np.zeros_like(facts), df, skew=skew)
    replicates = ((columns - mean) ** 2).sum((-2, -1)) / (r * (r - 1))
    interaction = (scale * (values - rows - columns + mean) ** 2).sum((-2, -1)) / (r * (r - 1))
    # Replicates that agree to the last digit by chance have not been tested.
    replicates = np.where(replicates == 0, interaction, replicates)
    return Squares(facts, replicates, interaction, df, float(r - 1), df * (r - 1), skew)


def crossed(one: Squares, other: Squares, both: Squares) -> Squares:
    """Of facts clustered in two ways at once: what each adds, less what both hold (Cameron, Gelbach & Miller 2011)."""
    return Squares(
        np.maximum(one.facts + other.facts - both.facts, np.maximum(one.facts, other.facts)),
        one.replicates,
        np.maximum(
            one.interaction + other.interaction - both.interaction, np.maximum(one.interaction, other.interaction)
        ),
        min(one.df_facts, other.df_facts),
        one.df_replicates,
        min(one.df_interaction, other.df_interaction),
        np.where(one.facts > other.facts, one.skew, other.skew),
    )


def cluster_means(values: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Means of clusters `(…, cluster, replicate)`, and the clusters' shares of the facts."""
    counts = np.bincount(codes)
    member = np.zeros((len(counts), len(codes)))
    member[codes, np.arange(len(codes))] = 1
    return (member / counts[:, None]) @ values, counts / len(codes)


def cluster_df(codes: np.ndarray) -> float:
    """Degrees of freedom that clusters of these sizes leave."""
    return _bell_mccaffrey(np.bincount(codes) / len(codes))


def _bell_mccaffrey(w: np.ndarray) -> float:
    d = w**2 / (1 - w)
    return float(1 / ((w**2).sum() + d.sum() ** 2 - (d**2).sum()))


def _skew(moves: np.ndarray) -> np.ndarray:
    """Skewness of a mean to which every row adds its move."""
    second = (moves**2).sum((-2, -1))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(second > 0, (moves**3).sum((-2, -1)) / second**1.5, 0.0)
