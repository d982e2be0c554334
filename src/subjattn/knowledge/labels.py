"""What "known" can mean, side by side: SliCK, popularity, base-model loss, confidence; and how far they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr


DEFINITIONS = {
    "p_greedy": "share of right greedy answers over few-shot prompts (SliCK, P(T=0))",
    "p_sampled": "share of right sampled answers (SliCK, P(T>0))",
    "confidence": "mean probability of the model's own greedy answer, right or wrong",
    "answer_logprob": "log-probability of the first accepted answer, asked without demonstrations (minus base loss)",
    "popularity": "popularity of the subject",
    "popularity_in_relation": "rank of the popularity among facts of the relation, as a share",
    "popularity_in_answer": "rank of the popularity among facts with the same relation and answer, as a share",
}
MIN_FACTS = 10
MIN_GROUP = 3
"""Facts of a group in which a rank means something."""


def with_popularity_ranks(facts: pd.DataFrame) -> pd.DataFrame:
    """The facts with their popularity's rank (0 to 1) within the relation, and within relation and answer.

    NaN in groups of fewer than three facts.
    """
    answer = facts["answers"].str[0]
    within = {"popularity_in_relation": [facts["relation"]], "popularity_in_answer": [facts["relation"], answer]}
    ranks = {}
    for name, keys in within.items():
        groups = facts["popularity"].groupby(keys)
        ranks[name] = groups.rank(pct=True).where(groups.transform("count") >= MIN_GROUP)
    return facts.assign(**ranks)


def agreement(labels: pd.DataFrame) -> dict[str, Any]:
    """How far the definitions agree.

    Args:
        labels: one row per fact with those of DEFINITIONS that there are, `category`, `relation`, `answers`.

    Returns:
        `spearman`: rank correlation of every two definitions (None where fewer than 10 facts have both, or one is
        the same everywhere). `known`: for every definition the share of facts on which its upper half and SliCK's
        known (any category but Unknown) say the same, and Cohen's kappa of the two.
    """
    names = [name for name in DEFINITIONS if name in labels and labels[name].notna().sum() >= MIN_FACTS]
    known = labels["category"] != "Unknown"
    return {
        "n_facts": len(labels),
        "categories": labels["category"].value_counts().to_dict(),
        "definitions": {name: DEFINITIONS[name] for name in names},
        "spearman": {a: {b: _spearman(labels[a], labels[b]) for b in names} for a in names},
        "known": {name: _halves(labels[name], known) for name in names if not name.startswith("p_")},
    }


def _spearman(a: pd.Series, b: pd.Series) -> float | None:
    both = a.notna() & b.notna()
    if both.sum() < MIN_FACTS or a[both].nunique() == 1 or b[both].nunique() == 1:
        return None
    return float(spearmanr(a[both], b[both]).statistic)


def _halves(values: pd.Series, known: pd.Series) -> dict[str, float | int | None]:
    """Agreement of the upper half by a definition with what SliCK calls known."""
    present = values.notna()
    upper, label = values[present] > values[present].median(), known[present]
    observed = float((upper == label).mean())
    chance = float(upper.mean() * label.mean() + (1 - upper.mean()) * (1 - label.mean()))
    kappa = None if np.isclose(chance, 1) or not upper.any() else (observed - chance) / (1 - chance)
    return {"n": int(present.sum()), "agreement": observed, "kappa": kappa}
