"""Sets of heads or layers that one intervention takes together, and random sets to compare them with."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from subjattn.errors import BadInput


Heads = Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Sets:
    """Sets of cells (layer, head), or (layer, -1) for whole layers, by name: `chosen`, `random 0`, …

    `matched` says what the random ones have in common with the one that was chosen.
    """

    cells: dict[str, tuple[tuple[int, int], ...]]
    matched: str

    @property
    def in_words(self) -> list[str]:
        """Of each set: "23.4 17.5" are heads, "3 4" layers."""
        return [
            " ".join(f"{layer}" if head < 0 else f"{layer}.{head}" for layer, head in cells)
            for cells in self.cells.values()
        ]


def parse_sets(
    heads: Heads | None, layers: Sequence[int] | None, n_layers: int, n_heads: int, *, random_sets: int, seed: int
) -> Sets:
    """The set asked for, of heads `(layer, head)` or of whole layers, and random sets of the same size.

    Random sets of heads have as many heads in each layer as the chosen one, of heads that are not in it; in a layer
    that has too few others, of all its heads. Random sets of layers are of layers that are not chosen, where there are
    enough. All sets differ.

    Raises:
        BadInput: no set, one outside the model, or more random sets than there are.
    """
    if (heads is None) == (layers is None):
        raise BadInput("give heads=[(layer, head), …] or layers=[layer, …], one of them")
    if heads is not None:
        chosen = [(int(layer), int(head)) for layer, head in heads]
        limits = "heads are (layer, head)"
        pools = {layer: [(layer, head) for head in range(n_heads)] for layer, _ in chosen}
        matched = "as many heads in each layer as the chosen set"
    else:
        chosen, limits = [(int(layer), -1) for layer in layers or ()], "layers are numbers"
        pools = {0: [(layer, -1) for layer in range(n_layers)]}
        matched = "as many layers as the chosen set"
    outside = [cell for cell in chosen if not (0 <= cell[0] < n_layers and cell[1] < n_heads)]
    if heads is not None:
        outside += [cell for cell in chosen if cell[1] < 0]
    if not chosen or outside or len(set(chosen)) < len(chosen):
        raise BadInput(
            f"{heads if heads is not None else layers!r} is no set of this model: {limits}, each once, of {n_layers} "
            f"layers with {n_heads} heads"
        )
    sizes = Counter(layer for layer, _ in chosen) if heads is not None else Counter({0: len(chosen)})
    others = {place: [cell for cell in pool if cell not in chosen] for place, pool in pools.items()}
    tight = [place for place, size in sizes.items() if len(others[place]) < size]
    drawn_from = {place: pools[place] if place in tight else others[place] for place in sizes}
    if tight:
        where = f"in layers {', '.join(map(str, sorted(tight)))} " if heads is not None else ""
        matched += f"; {where}too few others are left, so that random sets may share some with it"
    else:
        matched += ", and none that is in it"
    there = math.prod(math.comb(len(drawn_from[place]), size) for place, size in sizes.items()) - (
        1 if all(place in tight for place in sizes) else 0
    )
    if not 0 <= random_sets <= there:
        raise BadInput(f"random_sets={random_sets}: there are {there} other sets with {matched}")
    named = {"chosen": tuple(sorted(chosen))}
    rng, seen = np.random.default_rng(seed), {named["chosen"]}
    while len(seen) <= random_sets:
        drawn = [
            drawn_from[place][int(i)]
            for place, size in sizes.items()
            for i in rng.choice(len(drawn_from[place]), size, replace=False)
        ]
        if (cells := tuple(sorted(drawn))) not in seen:
            named[f"random {len(seen) - 1}"] = cells
            seen.add(cells)
    return Sets(named, f"{matched} (seed {seed})" if random_sets else "")
