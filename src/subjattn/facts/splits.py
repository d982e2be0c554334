"""Training arms and held-out test facts that differ in popularity and in nothing else we can match.

Known and unknown are the upper and lower thirds by popularity *within each answer*. Each arm draws
equally many facts from every cell of (answer, subject length in tokens), so all arms learn the same
answers in the same proportions from names of the same length; without that, popular and unpopular
halves differ in answers (China, India against USA, Germany) and every contrast is confounded.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from subjattn.errors import BadInput


THIRDS = ("bottom", "middle", "top")
ARMS = ("known", "unknown", "random")
_POOLS = {"known": ("top",), "unknown": ("bottom",), "random": THIRDS}


def popularity_thirds(facts: pd.DataFrame) -> pd.Series:
    """`top`, `middle` or `bottom` third by popularity among the facts with the same answer.

    Answers with fewer than three facts, and facts without a popularity, get no third (None).
    """
    ranked = facts[facts["popularity"].notna()].sort_values(["popularity", "fact_id"])
    groups = ranked.groupby(ranked["answers"].str[0])["popularity"]
    rank, size = groups.cumcount(), groups.transform("size")
    third = pd.Series(np.array(THIRDS, dtype=object)[(rank * 3 // size).to_numpy(int)], index=ranked.index)
    return third.where(size >= 3, None).reindex(facts.index, fill_value=None)


def split(
    facts: pd.DataFrame, n_tokens: Sequence[int], arms: Sequence[str], n_train: int, n_test: int, seed: int = 0
) -> pd.DataFrame:
    """Facts of a study with a column `third`, `n_tokens`, `test` and one `train_<arm>` per arm.

    Test facts are drawn first, equally from the thirds and with the same answers in each, and are in
    no arm; an arm's facts then come from its own thirds (`random`: from all). Arms may share facts
    only with `random`. The result depends on the seed and not on the order of rows.

    Args:
        facts: a table of facts with popularity.
        n_tokens: the subject's length in tokens, one per fact.
        arms: at least one of `known`, `unknown`, `random`; which ones are asked for changes the draw, since
            all draw from the cells in which every one of them has facts.
        n_train: facts per arm.
        n_test: held-out facts, a third from each third (to one).
        seed: of every draw.

    Raises:
        BadInput: too few facts (the message says how many there are), or a subject in several facts,
            which could be learnt and tested at once.
    """
    repeated = facts["subject"][facts["subject"].str.casefold().duplicated()]
    if len(repeated):
        raise BadInput(f"subject {repeated.iloc[0]!r} is in several facts and could be learnt and tested: merge them")
    rng = np.random.default_rng(seed)
    table = facts.assign(n_tokens=list(n_tokens), third=popularity_thirds(facts), answer=facts["answers"].str[0])
    table = table[table["third"].notna()].sort_values("fact_id", ignore_index=True)
    table["test"] = _draw_test(table, n_test, rng)
    left = table[~table["test"]]
    cells = ["answer", "n_tokens"]
    room = pd.concat(
        [left[left["third"].isin(_POOLS[arm])].groupby(cells).size().rename(arm) for arm in arms], axis=1
    ).fillna(0)
    slots = room.min(axis=1).astype(int)
    if not 1 <= n_train <= slots.sum():
        raise BadInput(
            f"n_train={n_train} is not between 1 and the {slots.sum()} facts that each arm can have "
            "with equal answers and subject lengths"
        )
    cell_of_slot = np.repeat(np.arange(len(slots)), slots.to_numpy())
    taken = pd.Series(rng.choice(cell_of_slot, n_train, replace=False)).value_counts().sort_index()
    wanted = {slots.index[cell]: int(count) for cell, count in taken.items()}  # type: ignore[call-overload]
    for arm in arms:
        pool = left[left["third"].isin(_POOLS[arm])]
        chosen = [
            rng.choice(group.index.to_numpy(), wanted[cell], replace=False)
            for cell, group in pool.groupby(cells)
            if cell in wanted
        ]
        table[f"train_{arm}"] = table.index.isin(np.concatenate(chosen))
    return table


def _draw_test(table: pd.DataFrame, n_test: int, rng: np.random.Generator) -> np.ndarray:
    """Which facts are held out: rounds over answers, one fact of each third a round."""
    triples = table.groupby(["answer", "third"]).size().unstack(fill_value=0).min(axis=1)
    # At most half of an answer's smallest third, so that training facts of it remain.
    slots = np.repeat(np.arange(len(triples)), (triples // 2).to_numpy())
    n_triples = -(-n_test // 3)
    if not 1 <= n_triples <= len(slots):
        raise BadInput(f"n_test={n_test} is not between 1 and the {3 * len(slots)} facts that can be held out")
    per_answer = pd.Series(rng.choice(slots, n_triples, replace=False)).value_counts().sort_index()
    groups = {key: group.index.to_numpy() for key, group in table.groupby(["answer", "third"])}
    chosen: list[int] = []
    for third in THIRDS[::-1]:
        for cell, count in per_answer.items():
            answer = triples.index[cell]  # type: ignore[call-overload]
            chosen.extend(rng.choice(groups[answer, third], int(count), replace=False))
    return table.index.isin(chosen[:n_test])
