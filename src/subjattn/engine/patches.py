"""Patches of cones: where they go among the tokens, and the values they bring."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor

from subjattn.engine.attend import Tokens
from subjattn.engine.base import Base
from subjattn.engine.interventions import BY_HEAD, Component, Patch, Row, Run, fitted
from subjattn.errors import NotFired


_Place = tuple[int, int, Patch, Run | None]
"""A flat token, the position's number in its patch, the patch, and the run that its values are taken from."""


class Patches:
    """All patches of some cones, by component and layer; each position must be written exactly once.

    Args:
        base: what named runs' values come from.
        tokens: the cones' tokens.
        rows: with the flat token at which position 0 of its prompt would stand; those without a patch do not count.
    """

    def __init__(self, base: Base, tokens: Tokens, rows: Iterable[tuple[int, Row]]) -> None:
        self.base, self.tokens = base, tokens
        self.places: dict[tuple[Component, int], list[_Place]] = {}
        for origin, row in rows:
            for patch in row.patches:
                place, source = self.places.setdefault((patch.component, patch.layer), []), patch.source(row.arm)
                place += [(origin + position, i, patch, source) for i, position in enumerate(patch.positions)]
        self.flat = {key: torch.tensor([flat for flat, *_ in place]) for key, place in self.places.items()}
        self.missing = sum(map(len, self.places.values()))

    def put(
        self, component: Component, layer: int, state: Float[Tensor, "one token ..."]
    ) -> Float[Tensor, "one token ..."] | None:
        """A component's output for the selected tokens, patched; None if no patch belongs to them."""
        if (component, layer) not in self.places:
            return None
        at = self.tokens.among_selected(self.flat[component, layer])
        chosen = (at >= 0).nonzero()[:, 0]
        if not len(chosen):
            return None
        here = [self.places[component, layer][i] for i in chosen.tolist()]
        self.missing -= len(here)
        state = state.clone()
        where = (at[chosen].to(state.device), *_heads(component, here, state.device))
        state[0][where] = self._values(component, layer, here, state)
        return state

    def _values(
        self, component: Component, layer: int, here: list[_Place], state: Tensor
    ) -> Float[Tensor, "patch width"]:
        """Taken from the run that a patch names, or brought along."""
        taken = [j for j, (*_, source) in enumerate(here) if source is not None]
        if not taken:
            return torch.stack([fitted(component, patch.values[i], state) for _, i, patch, _ in here])  # type: ignore[misc, index]
        runs = [here[j][3] for j in taken]
        positions = [patch.taken_at[i] for _, i, patch, _ in (here[j] for j in taken)]
        heads = [here[j][2].head for j in taken] if component in BY_HEAD else None
        found = fitted(component, self.base.taken(component, layer, runs, positions, heads), state)  # type: ignore[arg-type]
        if len(taken) == len(here):
            return found
        values = found.new_empty(len(here), found.shape[1])
        values[taken] = found
        for j, (_, i, patch, source) in enumerate(here):
            if source is None:
                values[j] = fitted(component, patch.values[i], state)  # type: ignore[index]
        return values

    def check_fired(self) -> None:
        if self.missing:
            raise NotFired(f"{self.missing} patched positions were never written, or written twice")


def _heads(component: Component, here: list[_Place], device: torch.device) -> tuple[Tensor, ...]:
    """The heads of patches that belong to one, as an index."""
    return (torch.tensor([patch.head for _, _, patch, _ in here], device=device),) if component in BY_HEAD else ()
