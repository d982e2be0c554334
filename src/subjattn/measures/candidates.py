"""Right and wrong answers in balance, so that nothing is gained by knowing the answers and not the subjects.

Within a relation and a fold the right answers are dealt out again as wrong ones, twice: once one way round and once
the other, so that of any two answers that meet each is the right one once. A score of the answer alone then ranks
exactly half of the pairs right, however frequent some answers are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from subjattn.errors import BadInput
from subjattn.facts.names import plain_name
from subjattn.prompts import Prompt


NOBODY = -1


@dataclass(frozen=True)
class Candidates:
    """Wrong answers of facts, as numbers of the facts whose right answers they are; NOBODY where there is none.

    Attributes:
        fold: of every fact, by subject.
        wrong: of every fact as many.
        other: another fact of the relation, for which none of these answers is right.
    """

    fold: Int[np.ndarray, " fact"]
    wrong: Int[np.ndarray, "fact pair"]
    other: Int[np.ndarray, " fact"]

    @property
    def paired(self) -> np.ndarray:
        """Facts that have wrong answers."""
        found: np.ndarray = self.wrong[:, 0] != NOBODY
        return found


def deal(
    prompts: Sequence[Prompt], relations: Mapping[str, str] | None, pairs: int, folds: int, seed: int
) -> Candidates:
    """Wrong answers for every fact, from facts of its relation and fold.

    Where most facts of a relation and fold have one answer, only as many of these take part as there are others.

    Args:
        prompts: the facts; right is the first accepted answer, wrong one that is not accepted.
        relations: by fact id; None: all are of one.
        pairs: wrong answers of a fact, an even number; one may come twice.
        folds: of subjects.
        seed: of folds and deals.

    Raises:
        BadInput: no facts of one relation and fold have different answers, or a number does not fit.
    """
    if pairs < 2 or pairs % 2:
        raise BadInput(f"wrong is {pairs}: wrong answers are dealt out in twos, so give an even number of 2 or more")
    if folds < 2:
        raise BadInput(f"folds is {folds}: give 2 or more")
    rng = np.random.default_rng(seed)
    own = np.array(["" if relations is None else relations[prompt.fact_id] for prompt in prompts])
    answers, fold = same_answers(prompts), _folds(prompts, own, folds, rng)
    wrong = np.full((len(prompts), pairs), NOBODY)
    for relation in np.unique(own):
        for number in range(folds):
            members = np.flatnonzero((own == relation) & (fold == number))
            members = _without_excess(members, answers, rng)
            for pair in range(0, pairs if len(members) else 0, 2):
                order, shift = _order(members, answers, rng)
                wrong[order, pair], wrong[order, pair + 1] = np.roll(order, -shift), np.roll(order, shift)
    found = Candidates(fold, wrong, _others(own, answers, wrong, rng))
    if not found.paired.any():
        raise BadInput(
            f"none of {len(prompts)} facts has a wrong answer beside its right one: in no fold of a relation are there "
            "two facts with different answers; ask more facts, or take fewer folds"
        )
    return found


def same_answers(prompts: Sequence[Prompt]) -> Int[np.ndarray, " fact"]:
    """Numbers of answers; facts that share an accepted one, at once or by way of others, have the same number.

    Spellings that `facts.names` takes for one name are one answer.
    """
    numbers: dict[str, int] = {}
    edges = [
        (fact, len(prompts) + numbers.setdefault(plain_name(answer), len(numbers)))
        for fact, prompt in enumerate(prompts)
        for answer in prompt.answers
    ]
    size = len(prompts) + len(numbers)
    fact, name = np.array(edges).T
    graph = coo_matrix((np.ones(len(edges)), (fact, name)), shape=(size, size))
    found: np.ndarray = connected_components(graph, directed=False)[1][: len(prompts)]
    return found


def _folds(prompts: Sequence[Prompt], relations: np.ndarray, folds: int, rng: np.random.Generator) -> np.ndarray:
    """A fold for every subject, those of a relation spread evenly."""
    first: dict[str, str] = {}
    for prompt, relation in zip(prompts, relations, strict=True):
        first.setdefault(prompt.subject, relation)
    subjects = sorted(first)
    shuffled = [subjects[i] for i in rng.permutation(len(subjects))]
    shuffled.sort(key=lambda subject: first[subject])
    number = {subject: place % folds for place, subject in enumerate(shuffled)}
    return np.array([number[prompt.subject] for prompt in prompts])


def _without_excess(members: np.ndarray, answers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of facts of one answer no more than there are of all others."""
    counts = np.bincount(answers[members])
    if not len(members) or 2 * counts.max() <= len(members):
        return members
    most = answers[members] == counts.argmax()
    kept = rng.permutation(members[most])[: int((~most).sum())]
    return np.sort(np.concatenate([members[~most], kept]))


def _order(members: np.ndarray, answers: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """The facts in a circle, those of one answer together, and how far on every one meets another answer."""
    own = answers[members]
    place = rng.permutation(own.max() + 1)[own]
    most = int(np.bincount(own).max())
    return members[np.lexsort((rng.random(len(members)), place))], int(rng.integers(most, len(members) - most + 1))


def _others(
    relations: np.ndarray, answers: np.ndarray, wrong: np.ndarray, rng: np.random.Generator
) -> Int[np.ndarray, " fact"]:
    """Of every fact another of its relation whose answer is none of its candidates."""
    order, found = rng.permutation(len(answers)), np.full(len(answers), NOBODY)
    for fact in np.flatnonzero(wrong[:, 0] != NOBODY):
        candidates = {answers[fact], *answers[wrong[fact]]}
        found[fact] = next(
            (i for i in order if relations[i] == relations[fact] and answers[i] not in candidates), NOBODY
        )
    return found
