"""Knowledge as a graph, after Gong et al. (2025): facts are edges, training and demonstrations add some.

Their definitions are not published; these are ours. Nodes are the names of subjects and answers. A fact is an edge of
its relation from its subject to its answer. Names are tied by their similarity: the cosine of their vectors where it
is above 0, and 1 where they are one name. From a subject to an answer an edge makes a path, of the strength

    similarity(subject, edge's subject) · similarity(edge's answer, answer)

and a set of edges connects the two by 1 − Π (1 − strength): as likely as that one path holds, did each hold by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from subjattn.errors import BadInput
from subjattn.facts.names import plain_name


class Edge(NamedTuple):
    """A fact that a graph has."""

    subject: str
    relation: str
    answer: str


class KnowledgeGraph:
    """Names with their vectors; what it is asked of are edges.

    Args:
        names: of subjects and answers; case and spaces around them do not matter.
        vectors: `(name, dim)`.

    Raises:
        BadInput: vectors that do not fit the names, or have no direction.
    """

    def __init__(self, names: Sequence[str], vectors: np.ndarray) -> None:
        lengths = np.linalg.norm(vectors, axis=1)
        if len(names) != len(vectors) or not (np.isfinite(lengths).all() and (lengths > 0).all()):
            raise BadInput(f"{len(names)} names want as many vectors, none of them zero or infinite")
        self._number = {plain_name(name): number for number, name in enumerate(names)}
        self._unit = vectors / lengths[:, None]

    def similarity(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """Of every name of `a` to every one of `b`: `(a, b)`, from 0 to 1."""
        rows, columns = (np.array([self._of(name) for name in names], int) for names in (a, b))
        cosine = np.clip(self._unit[rows] @ self._unit[columns].T, 0.0, 1.0)
        return np.where(rows[:, None] == columns[None, :], 1.0, cosine)

    def unconnected(self, facts: Sequence[Edge], edges: Iterable[Edge]) -> np.ndarray:
        """`(fact,)`, the logarithm of 1 − connectivity of each fact's subject and answer by edges of its relation.

        An edge that is named twice, such as a fact both known and trained on, counts once.

        0 where no edge connects them; −inf where one is the fact itself.
        """
        found, there = np.zeros(len(facts)), self._distinct(edges)
        for relation in dict.fromkeys(fact.relation for fact in facts):
            own = [edge for edge in there if edge.relation == relation]
            index = [number for number, fact in enumerate(facts) if fact.relation == relation]
            if own:
                strength = self.similarity([facts[i].subject for i in index], [edge.subject for edge in own])
                strength *= self.similarity([facts[i].answer for i in index], [edge.answer for edge in own])
                with np.errstate(divide="ignore"):
                    found[index] = np.log1p(-strength).sum(axis=1)
        return found

    def connectivity(self, facts: Sequence[Edge], edges: Iterable[Edge]) -> np.ndarray:
        """`(fact,)`, from 0 to 1: how far edges of a fact's relation connect its subject with its answer."""
        connected: np.ndarray = -np.expm1(self.unconnected(facts, edges))
        return connected

    def added(self, facts: Sequence[Edge], edges: Iterable[Edge], more: Iterable[Edge]) -> np.ndarray:
        """`(fact,)`, the logarithm of the connectivity that `more` edges add to those there are; −inf: none.

        Those of them that are there already add nothing.
        """
        there = self._distinct(edges)
        known = set(map(self._known_as, there))
        new = [edge for edge in self._distinct(more) if self._known_as(edge) not in known]
        with np.errstate(divide="ignore"):
            gained: np.ndarray = self.unconnected(facts, there) + np.log(self.connectivity(facts, new))
        return gained

    def _distinct(self, edges: Iterable[Edge]) -> list[Edge]:
        """Each edge once, however often and in whatever spelling it is named."""
        return list({self._known_as(edge): edge for edge in edges}.values())

    def _known_as(self, edge: Edge) -> tuple[int, str, int]:
        return self._of(edge.subject), edge.relation, self._of(edge.answer)

    def _of(self, name: str) -> int:
        number = self._number.get(plain_name(name))
        if number is None:
            raise BadInput(f"the graph has no name {name!r}")
        return number
