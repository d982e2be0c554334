"""A world of facts in which every subject's popularity and every answer are known (Ghosal et al. 2024, sec. 3)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from subjattn.errors import BadInput


Prior = Literal["uniform", "zipf"]


@dataclass(frozen=True)
class Tokens:
    """Numbers of the one-layer model's tokens: subjects, relations, a prompt token for each relation, answers.

    Subjects, relations and prompts stand first, as only they are ever read.
    """

    n_subjects: int
    n_relations: int
    n_answers: int

    @property
    def n_read(self) -> int:
        return self.n_subjects + 2 * self.n_relations

    @property
    def n(self) -> int:
        return self.n_read + self.n_relations * self.n_answers

    def relation(self, relation: np.ndarray | int) -> np.ndarray | int:
        return self.n_subjects + relation

    def prompt(self, relation: np.ndarray | int) -> np.ndarray | int:
        return self.n_subjects + self.n_relations + relation

    def answer(self, relation: np.ndarray | int, answer: np.ndarray | int) -> np.ndarray | int:
        return self.n_read + relation * self.n_answers + answer


@dataclass(frozen=True)
class World:
    """One answer for every subject and relation; no answer belongs to two relations.

    Subjects are numbered by popularity, the most popular first; subject `i` is met in proportion to
    `(i + 1) ** -zipf`, its relations alike. `answers` is `(subject, relation)`, numbers within the relation.
    """

    answers: np.ndarray
    n_answers: int
    zipf: float

    @property
    def tokens(self) -> Tokens:
        n_subjects, n_relations = self.answers.shape
        return Tokens(n_subjects, n_relations, self.n_answers)

    @property
    def chances(self) -> np.ndarray:
        """How often each subject is met, `(subject,)`, adding up to one."""
        weights = np.arange(1, len(self.answers) + 1) ** -float(self.zipf)
        return np.asarray(weights / weights.sum())

    @property
    def answer_tokens(self) -> np.ndarray:
        """The token of every fact's answer, `(subject, relation)`."""
        return np.asarray(self.tokens.answer(np.arange(self.answers.shape[1]), self.answers))

    def meet(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Facts as pre-training meets them, independent draws: `(n, 2)` of subject and relation; more begin alike."""
        where, n_relations = rng.random((n, 2)), self.answers.shape[1]
        subjects = np.searchsorted(np.cumsum(self.chances), where[:, 0], side="right")
        relations = (where[:, 1] * n_relations).astype(int)
        return np.stack([np.minimum(subjects, len(self.answers) - 1), relations], axis=1)


def make_world(
    n_subjects: int, n_relations: int, n_answers: int, zipf: float, *, prior: Prior = "uniform", seed: int = 0
) -> World:
    """A world with answers drawn at random, in which each answer of a relation is that of some subject.

    Args:
        n_subjects: of every relation.
        n_relations: each with answers of its own.
        n_answers: of a relation.
        zipf: exponent of the subjects' popularity; 0 makes them alike.
        prior: how often the answers of a relation are right: alike, or answer `k` in proportion to `1 / (k + 1)`.
        seed: of the answers.

    Raises:
        BadInput: numbers that no world has.
    """
    for name, value in (("n_subjects", n_subjects), ("n_relations", n_relations), ("n_answers", n_answers)):
        if value < 1:
            raise BadInput(f"{name}={value}: a world has at least one", field=name)
    if n_answers > n_subjects:
        raise BadInput(
            f"n_answers={n_answers} is more than the {n_subjects} subjects: each answer has to be somebody's",
            field="n_answers",
        )
    if not 0 <= zipf < np.inf:
        raise BadInput(f"zipf={zipf} is no exponent of popularity: 0 (all alike) or more", field="zipf")
    if prior not in get_args(Prior):
        raise BadInput(f"prior={prior!r} is none of {', '.join(get_args(Prior))}", field="prior")
    rng = np.random.default_rng([seed, n_subjects, n_relations, n_answers])
    weights = np.ones(n_answers) if prior == "uniform" else 1 / np.arange(1, n_answers + 1)
    answers = np.empty((n_subjects, n_relations), int)
    for relation in range(n_relations):
        rest = rng.choice(n_answers, n_subjects - n_answers, p=weights / weights.sum())
        answers[:, relation] = rng.permutation(np.concatenate([np.arange(n_answers), rest]))
    return World(answers, n_answers, float(zipf))
