"""Which facts are held out of training: test and validation facts, drawn from each third alike."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.names import plain_name


def by_modal_answer(table: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    """Whether a fact has its relation's most frequent answer, and whether none of its answers is any such fact's."""
    counts = table.groupby(["relation", "answer"], as_index=False).size()
    modal = counts.sort_values(["size", "answer"], ascending=[False, True]).groupby("relation")["answer"].first()
    trained = table["answer"] == table["relation"].map(modal)
    accepted = [set(map(plain_name, answers)) for answers in table["answers"]]
    taken = {answer for answers, own in zip(accepted, trained, strict=True) if own for answer in answers}
    apart = [taken.isdisjoint(answers) for answers in accepted]
    return trained, pd.Series(apart, index=table.index)


def draw_test(
    candidates: pd.DataFrame,
    n_test: int,
    cells: Sequence[str],
    levels: Sequence[str],
    rng: np.random.Generator,
    field: str = "n_test",
) -> np.ndarray:
    """Rows held out, as many as the argument `field` says: rounds over cells (without any, over all), one fact of each
    level a round.
    """
    levels = sorted(levels, reverse=True)
    cell = cells_of(candidates, cells)
    rounds = candidates.groupby([cell, "third"]).size().unstack(fill_value=0).reindex(columns=levels, fill_value=0)
    # At most half of a cell's smallest third, so that training facts of it remain.
    n_rounds = rounds.min(axis=1) // (2 if cells else 1)
    slots = np.repeat(n_rounds.index.to_numpy(), n_rounds.to_numpy(int))
    if not 1 <= n_test <= len(levels) * len(slots):
        equally = f" with equal {', '.join(cells)} in" if cells else " equally from"
        raise BadInput(
            f"{field}={n_test} is not between 1 and the {len(levels) * len(slots)} facts that can be held out{equally} "
            f"{' and '.join(levels)}: ask for fewer{' or match on less' if cells else ''}",
            field=field,
        )
    per_cell = np.unique(rng.choice(slots, -(-n_test // len(levels)), replace=False), return_counts=True)
    groups = {key: group.index.to_numpy() for key, group in candidates.groupby([cell, "third"])}
    chosen = []
    for i, level in enumerate(levels):
        drawn = [rng.choice(groups[key, level], count, replace=False) for key, count in zip(*per_cell, strict=True)]
        chosen.append(np.concatenate(drawn)[: (n_test + len(levels) - 1 - i) // len(levels)])
    return np.concatenate(chosen)


def cells_of(table: pd.DataFrame, names: Sequence[str]) -> pd.Series:
    """Number of each fact's cell, in the order of the cells' values."""
    if not names:
        return pd.Series(0, index=table.index)
    return table.groupby(list(names), dropna=False).ngroup()
