"""Which facts count as well known, and which are set aside as demonstrations: table to table, no model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from subjattn.facts import draw
from subjattn.facts.names import plain_name


THIRDS = ("bottom", "middle", "top")
CATEGORIES = ("HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown")
WITHIN = ("relation", "answer")
SET_ASIDE = 15
"""Facts of a third of a relation that may be shown as demonstrations at most."""


def first_answers(facts: pd.DataFrame) -> pd.Series:
    """The first accepted answer of each fact, the same answer always in the spelling that comes first."""
    first = facts["answers"].str[0]
    return first.groupby(first.map(plain_name)).transform("first")


def thirds(facts: pd.DataFrame, by: str = "popularity", within: Sequence[str] = WITHIN) -> pd.Series:
    """`top`, `middle` or `bottom` third by the column `by` among facts with the same `within`, one per fact.

    Facts without a score get none (None), nor do groups of fewer than three facts unless `within` is empty.
    """
    ranked = ranks(facts, by, within)
    third = np.array(THIRDS, dtype=object)[(ranked["rank"] * 3 // ranked["size"]).to_numpy(int)]
    keeps = (ranked["size"] >= 3) | (not within)
    return pd.Series(third, index=ranked.index).where(keeps, None).reindex(facts.index, fill_value=None)


def ranks(facts: pd.DataFrame, by: str, within: Sequence[str]) -> pd.DataFrame:
    """`rank` in its group (0 is the lowest, ties by fact_id) and the group's `size` of each fact with a score."""
    scored = facts[facts[by].notna()].sort_values([by, "fact_id"])
    keys = [first_answers(scored) if name == "answer" else scored[name] for name in within]
    groups = scored.groupby(keys or np.zeros(len(scored)), dropna=False)[by]
    return pd.DataFrame({"rank": groups.cumcount(), "size": groups.transform("size")})


def ranked_within(within: Sequence[str], controlled: bool) -> Sequence[str]:
    """Among which facts a split ranks: within the relation where it is controlled, as one answer is trained there."""
    return ("relation",) if controlled else within


def thirds_of(
    facts: pd.DataFrame, by: str = "popularity", within: Sequence[str] = WITHIN, controlled: bool = False
) -> pd.Series:
    """The third of every fact as a split sees it, None where it takes no part.

    Args:
        facts: a table of facts with the column `by`.
        by: the column that ranks facts, or `category`: then `bottom` is Unknown and `top` all others.
        within: of `relation` and `answer`; see `split`.
        controlled: rank within the relation alone; see `split`.
    """
    if by != "category":
        return thirds(facts, by, ranked_within(within, controlled))
    third = pd.Series(np.where(facts["category"] == "Unknown", "bottom", "top"), facts.index, dtype=object)
    return third.where(facts["category"].notna(), None)


def set_aside(
    facts: pd.DataFrame,
    by: str = "popularity",
    within: Sequence[str] = WITHIN,
    controlled: bool = False,
    shots: int = 4,
    seed: int = 0,
) -> pd.Series:
    """Whether a fact is kept for demonstrations, drawn from every third of every relation as a split sees them.

    A fifth of each third, at most 15, but enough for the shots where that leaves half of the third. Facts without a
    third are one group more. What is drawn from one group does not depend on the others.

    Args:
        facts, by, within, controlled: as in `thirds_of`.
        shots: demonstrations of the style that shows most; 0 sets nothing aside.
        seed: of the draw.

    Returns:
        Booleans on the facts' index.
    """
    chosen: set[str] = set()
    if shots:
        third = thirds_of(facts, by, within, controlled)
        for _, group in facts.groupby(["relation", third.fillna("none")]):
            n = min(SET_ASIDE, max(len(group) // 5, min(shots + 1, len(group) // 2)))
            chosen |= set(draw(group, n, seed)["fact_id"]) if n else set()
    return facts["fact_id"].isin(chosen)
