"""How many facts and replicates decide a claim: by drawing mean squares as facts and replicates would give them.

For normal values the mean and the mean squares of a balanced table are independent, the squares χ² (Searle 1971), so
studies of any size can be drawn without their values and judged by the very rule that judges real ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from scipy import stats

from subjattn.evidence.intervals import CONFIDENCE, MIN_FACTS, MIN_REPLICATES
from subjattn.evidence.squares import Squares


ENOUGH = 0.8
"""Share of studies that should decide."""
STUDIES = 2_000
MOST_FACTS = 20_000
TRIED = (3, 4, 5, 6, 8, 10, 12, 16, 24)
"""Numbers of replicates among which the cheapest size is sought."""


@dataclass(frozen=True)
class Planned:
    """What a claim's power depends on.

    Attributes:
        variances: of one value, as `Interval.variances` has them. What clusters of facts add stays as it is with more
            facts, which come from the same clusters.
        effect: expected, in the claimed direction.
        smallest: effect that matters.
        family: claims that share the level.
        drawn: whether replicates are drawn, or given.
    """

    variances: Mapping[str, float]
    effect: float
    smallest: float
    family: int = 1
    drawn: bool = True

    def decided(self, facts: int, replicates: int) -> dict[str, float]:
        """Share of studies of this size with each verdict; `decided` is their sum."""
        r = replicates if self.drawn else 1
        if facts < MIN_FACTS or (self.drawn and r < MIN_REPLICATES):
            return dict.fromkeys(("supported", "contradicted", "no effect", "decided"), 0.0)
        s, clusters = self.variances, self.variances.get("clusters", 0.0)
        normal, chi = _draws()
        units = self.variances["clusters_df"] if clusters else facts - 1.0
        df = {"facts": units, "replicates": r - 1.0, "interaction": units * (r - 1.0)}
        expected = {
            "facts": s["facts"] / facts + clusters + s["interaction"] / (facts * r),
            "replicates": s["replicates"] / r + s["interaction"] / (facts * r),
            "interaction": s["interaction"] / (facts * r),
        }
        got = {
            name: expected[name] * stats.chi2.ppf(chi[name], df[name]) / df[name] if df[name] else np.zeros(STUDIES)
            for name in df
        }
        squares = Squares(
            got["facts"], got["replicates"], got["interaction"], df["facts"], df["replicates"], df["interaction"]
        )
        variance = s["facts"] / facts + clusters + s["replicates"] / r * (r > 1) + s["interaction"] / (facts * r)
        estimate = self.effect + normal * np.sqrt(variance)
        adjusted, plain = squares.reach(1 - (1 - CONFIDENCE) / self.family)[0], squares.reach()[0]
        supported = estimate - adjusted >= self.smallest
        contradicted = estimate + adjusted <= -self.smallest
        nothing = (np.abs(estimate) + plain <= self.smallest) & ~supported & ~contradicted
        shares = [float(one.mean()) for one in (supported, contradicted, nothing)]
        return dict(zip(("supported", "contradicted", "no effect", "decided"), [*shares, sum(shares)], strict=True))

    def facts_needed(self, replicates: int) -> int | None:
        """The fewest facts that decide in `ENOUGH` of all studies; None where no number does."""
        if self.decided(MOST_FACTS, replicates)["decided"] < ENOUGH:
            return None
        low, high = MIN_FACTS - 1, MOST_FACTS
        while high - low > max(1, low // 50):
            middle = (low + high) // 2
            if self.decided(middle, replicates)["decided"] >= ENOUGH:
                high = middle
            else:
                low = middle
        return high

    def needed(self, replicates: int) -> dict[str, Any]:
        """The cheapest size (facts × replicates, from the replicates there are) that decides, and facts alone.

        Returns:
            `facts` and `replicates`, None where no size up to 20,000 facts and 24 replicates does; `facts_alone`: how
            many facts would with the replicates there are.
        """
        many = sorted({replicates, *(r for r in TRIED if r > replicates)}) if self.drawn else [replicates]
        if self.decided(MOST_FACTS, many[-1])["decided"] < ENOUGH:
            return dict.fromkeys(("facts", "replicates", "facts_alone"))
        alone = self.facts_needed(replicates)
        sizes = [(facts * r, facts, r) for r in many if (facts := self.facts_needed(r)) is not None]
        _, facts, r = min(sizes, default=(0, None, None))
        return {"facts": facts, "replicates": r if self.drawn else None, "facts_alone": alone}


@cache
def _draws() -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """The same normal and uniform numbers for every size, so that power grows smoothly with it."""
    rng = np.random.default_rng(0)
    uniform = {name: rng.random(STUDIES) for name in ("facts", "replicates", "interaction")}
    return rng.normal(size=STUDIES), uniform
