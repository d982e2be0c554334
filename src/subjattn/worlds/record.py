"""Which invented worlds there are: what is said in each, how often, and how a model is trained on it."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Literal

from subjattn.digest import digest_of
from subjattn.errors import BadInput


PREFIX = "world:"
VERSION = 2
"""Of all worlds; raised when the same name comes to mean other sentences or another training."""


@dataclass(frozen=True)
class Shape:
    """A Llama's."""

    n_layers: int
    width: int
    n_heads: int


@dataclass(frozen=True)
class InventedWorld:
    """Facts, the sentences that say them, and a training.

    Attributes:
        name: as in `world:NAME`.
        kind: `zipf`, the world of Ghosal et al. (2024): a subject, a relation's word, an answer; `biographies`: people
            of two names, several wordings of each fact.
        n_subjects, n_relations, n_answers: of a relation; answers of relations are disjoint.
        zipf: exponent of the subjects' popularity.
        n_sentences: of the corpus, drawn by popularity; a fact's `popularity` is how many of them say it.
        namesakes: people who share a last name (biographies).
        shape: of the model.
        steps: of training at most.
        recall: share of the facts said at least once that is recalled in the corpus' own wordings before training may
            end; None: it ends after `steps` whatever is recalled.
        seed: of facts, corpus and training.
    """

    name: str
    kind: Literal["zipf", "biographies"]
    n_subjects: int
    n_relations: int
    n_answers: int
    zipf: float
    n_sentences: int
    shape: Shape
    steps: int
    recall: float | None
    namesakes: int = 1
    batch: int = 256
    learning_rate: float = 2e-3
    seed: int = 0

    @property
    def digest(self) -> str:
        """Of all that makes its facts and its model."""
        return digest_of({"version": VERSION, **asdict(self)})

    @property
    def full_name(self) -> str:
        return f"{PREFIX}{self.name}" + (f"@{self.seed}" if self.seed else "")


_ZIPF = InventedWorld(
    name="zipf",
    kind="zipf",
    n_subjects=400,
    n_relations=5,
    n_answers=20,
    zipf=1.0,
    n_sentences=20_000,
    shape=Shape(n_layers=2, width=64, n_heads=4),
    steps=4000,
    recall=0.98,
)
_BIOGRAPHIES = InventedWorld(
    name="biographies",
    kind="biographies",
    n_subjects=300,
    n_relations=5,
    n_answers=20,
    zipf=1.0,
    n_sentences=30_000,
    shape=Shape(n_layers=4, width=96, n_heads=4),
    steps=6000,
    recall=0.98,
    namesakes=3,
)

WORLDS: Mapping[str, InventedWorld] = {
    world.name: world
    for world in (
        _ZIPF,
        replace(_ZIPF, name="zipf-weak", steps=150, recall=None),
        _BIOGRAPHIES,
        replace(_BIOGRAPHIES, name="biographies-weak", steps=300, recall=None),
    )
}
"""Strong worlds recall what was said, before anything is fine-tuned; in weak ones use known facts only."""


def is_world(name: str) -> bool:
    """Whether a model's or a source's name is of an invented world."""
    return name.startswith(PREFIX)


def world_of(name: str) -> InventedWorld:
    """The world that `world:NAME` or `world:NAME@SEED` names; BadInput where there is none."""
    plain, at, seed = name.removeprefix(PREFIX).partition("@")
    if plain not in WORLDS:
        close = difflib.get_close_matches(plain, WORLDS, n=1)
        meant = f", did you mean {PREFIX}{close[0]}?" if close else ""
        raise BadInput(f"no world {plain!r}{meant}: there are {', '.join(PREFIX + known for known in WORLDS)}")
    if at and not seed.isdecimal():
        raise BadInput(f"{name!r}: behind @ stands the number of a world drawn anew, such as {PREFIX}{plain}@1")
    return replace(WORLDS[plain], seed=int(seed or 0))
