"""Facts taught with each other's answers: what is left to learn is how frequent answers are, and nothing of the names.

Within each relation the answers of an arm's facts are permuted at random, so that their counts stay. As few facts as
can be keep an answer that is right: a random permutation is repaired by random exchanges. (To shift facts sorted by
answer would do that as well, but sends all of one answer to one other, which a name gives away as it does the first.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.names import plain_name
from subjattn.facts.splits import facts_of, stream


def taught(facts: pd.DataFrame, spec: str, seed: int, draw: int = 0) -> pd.DataFrame:
    """An arm's facts with the answers it is trained on: their own, or where `spec` says `shuffled`, each other's.

    A fact takes another's `answers` and `answer` whole. None takes a first answer that it accepts itself, as long as
    two facts of its relation can exchange theirs; without answers that are aliases of each other no permutation does
    better: only of an answer that m of n facts have, m > n / 2, do 2m - n facts keep it.

    Args:
        facts: the arm's own, with `fact_id`, `relation`, `answers` and `answer`.
        spec: the arm's specification.
        seed: of every draw.
        draw: number of the draw of training facts.

    Raises:
        BadInput: a relation has one answer only.
    """
    own = facts_of(spec)
    if own == spec:
        return facts
    table = facts.sort_values("fact_id", ignore_index=True)
    source = np.arange(len(table))
    for relation, some in table.groupby("relation"):
        rows = some.index.to_numpy()
        accepted = [[plain_name(answer) for answer in answers] for answers in some["answers"]]
        if len({answers[0] for answers in accepted}) == 1:
            raise BadInput(
                f"arm {spec!r}: in relation {str(relation)!r} all {len(rows)} facts have the answer "
                f"{some['answer'].iloc[0]!r}, so there is nothing to shuffle: leave out the relation or the arm",
                field="arms",
            )
        source[rows] = rows[_permuted(accepted, stream(f"{own} shuffled in {relation}", seed, draw))]
    return table.assign(**{name: table[name].to_numpy()[source] for name in ("answers", "answer")})


def _permuted(accepted: Sequence[Sequence[str]], rng: np.random.Generator) -> np.ndarray:
    """Whose answer each fact takes; `accepted` are the answers of each that are right, the first to be passed on."""
    number = {answer: i for i, answer in enumerate(dict.fromkeys(a for answers in accepted for a in answers))}
    right = [np.array([number[answer] for answer in answers]) for answers in accepted]
    takes = rng.permutation(len(accepted))
    held = np.array([answers[0] for answers in right])[takes]
    accepting: dict[int, list[int]] = {}
    for i, answers in enumerate(right):
        for answer in answers.tolist():
            accepting.setdefault(answer, []).append(i)
    mended = True
    while mended:  # an exchange may make room for one that there was none for before
        mended = False
        for i in [int(i) for i in rng.permutation(len(accepted)) if held[i] in right[i]]:
            free = ~np.isin(held, right[i])
            free[accepting[int(held[i])]] = False
            if held[i] in right[i] and free.any():
                pair = [i, int(rng.choice(np.flatnonzero(free)))]
                takes[pair], held[pair] = takes[pair[::-1]], held[pair[::-1]]
                mended = True
    return takes
