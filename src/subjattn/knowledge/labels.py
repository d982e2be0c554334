"""What "known" can mean, side by side: SliCK, popularity, base-model loss, confidence; and how far they agree."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import spearmanr
from sklearn.metrics import cohen_kappa_score  # type: ignore[import-untyped]

from subjattn.errors import BadInput
from subjattn.models import identity, read_labels


DEFINITIONS = {
    "p_greedy": "share of right greedy answers over few-shot prompts (SliCK, P(T=0))",
    "p_sampled": "share of right sampled answers (SliCK, P(T>0))",
    "confidence": "mean probability of the model's own greedy answer, right or wrong",
    "answer_logprob": "log-probability of the first accepted answer (minus base loss), asked without demonstrations in "
    "the template that the column answer_logprob_template names: it ranks facts within one template only",
    "popularity": "popularity of the subject",
    "popularity_in_relation": "rank of the popularity among facts of the relation, as a share",
    "popularity_in_answer": "rank of the popularity among facts with the same relation and answer, as a share",
}
LABELS = ["category", "p_greedy", "p_sampled", "confidence", "answer_logprob", "answer_logprob_template"]
"""Columns that labelled facts have more than others."""
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


def join_labels(facts: pd.DataFrame, path: str, model_name: str) -> pd.DataFrame:
    """Facts with a model's labels from a `knowledge.parquet`; those that it does not label get none.

    Args:
        facts: a table of facts.
        path: the file that `subjattn knowledge` wrote; or `world:NAME`, which says what its model recalls.
        model_name: whose knowledge is wanted, by hub id, folder or `smollm2-135m`.

    Returns:
        The facts with `category`, `p_greedy`, `p_sampled`, `confidence`, `answer_logprob` and
        `answer_logprob_template`.

    Raises:
        BadInput: no such file, another file, or labels of an adapted model, of another model or another state of it,
            or of other facts than these.
    """
    labels = read_labels(path)
    if labels is None:
        raise BadInput(f"facts.knowledge: no such file: {path!r}")
    needed = ["fact_id", "subject", "relation", "answers", "model", "model_identity", "adapter", *LABELS]
    if missing := [name for name in needed if name not in labels]:
        raise BadInput(
            f"facts.knowledge: {path} has no column {missing[0]!r}: it is not from `subjattn knowledge` of this "
            "version, label the facts again"
        )
    if labels["fact_id"].duplicated().any():
        raise BadInput(f"facts.knowledge: {path} labels a fact twice: it is not from `subjattn knowledge`")
    own = labels.set_index("fact_id").reindex(facts["fact_id"])
    present = own["category"].notna().to_numpy()
    if not present.any():
        raise BadInput(
            f"facts.knowledge: {path} labels none of these facts, by their ids ({labels['fact_id'].iloc[0]} there, "
            f"{facts['fact_id'].iloc[0]} here): label these, or give both tables a column fact_id"
        )
    for name in ("subject", "relation", "answers"):
        pairs = zip(own[name], facts[name], strict=True)
        differ = present & np.array([not np.array_equal(theirs, ours) for theirs, ours in pairs])
        if differ.any():
            fact = facts[differ].iloc[0]
            raise BadInput(
                f"facts.knowledge: {path} labels another fact as {fact['fact_id']} ({fact[name]!r} here): the "
                "source has changed, label it again"
            )
    _check_whose(own[present], path, model_name)
    return facts.assign(**{name: own[name].to_numpy() for name in LABELS})


def _check_whose(labels: pd.DataFrame, path: str, model_name: str) -> None:
    """Refuse labels of another model than the one named, as it is now, without an adapter."""
    first, wanted = labels.iloc[0], identity(model_name)
    if labels["adapter"].notna().any():
        adapter = labels["adapter"].dropna().iloc[0]
        raise BadInput(
            f"facts.knowledge: {path} says what {first['model']!r} knows with the adapter {adapter!r}, and "
            f"{model_name!r} has none: label the facts with the model alone"
        )
    if set(labels["model_identity"]) != {wanted}:
        other = labels[labels["model_identity"] != wanted].iloc[0]
        what = "an earlier state of it" if other["model"] == model_name else repr(other["model"])
        raise BadInput(
            f"facts.knowledge: {path} says what {what} knows, and the model asked for is {model_name!r}: label the "
            "facts with it"
        )


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
    kappa = float(cohen_kappa_score(upper, label)) if upper.any() else None
    return {"n": int(present.sum()), "agreement": float((upper == label).mean()), "kappa": kappa}
