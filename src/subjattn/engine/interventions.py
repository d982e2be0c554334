"""Interventions as data: which edges to block, which states to replace, in which prompt.

A row is one prompt under at most one intervention of each kind. An intervention reaches only the
layers and positions of its cone: from its first layer up, and from its first position on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subjattn.prompts import Prompt


BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: well under 1 GB of working memory for a model of 135 M."""
PADDING = 1.25
"""A batch holds at most this many times its own tokens, so that short rows do not pay for long ones."""


@dataclass(frozen=True)
class Block:
    """Attention edges from `queries` to `keys` blocked before the softmax, in `layers` (None: all)."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """The residual stream before `layer` replaced at `positions` by another run's values."""

    layer: int
    positions: tuple[int, ...]
    values: Float[Tensor, "position d_model"]


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt under at most one intervention of each kind."""

    prompt: Prompt
    block: Block | None = None
    patch: Patch | None = None

    @property
    def first_layer(self) -> int:
        """The lowest layer whose computation differs from the base run's."""
        layers = [] if self.patch is None else [self.patch.layer]
        if self.block is not None:
            layers += [0] if self.block.layers is None else list(self.block.layers)
        return min(layers, default=0)

    @property
    def first_position(self) -> int:
        """The first position whose computation differs from the base run's; at most the prediction position."""
        positions = [self.prompt.prediction]
        positions += [] if self.patch is None else list(self.patch.positions)
        positions += [] if self.block is None else list(self.block.queries)
        return min(positions)


@dataclass
class Output:
    """What one batch of rows gave; `index` says where its rows stand among those asked for."""

    index: list[int]
    rows: list[Row]
    logits: Float[Tensor, "row answer vocab"]
    attention: dict[int, Float[Tensor, "row head query key"]] = field(default_factory=dict)


def batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped by similar length, within a budget of tokens and little padding."""
    batch: list[int] = []
    own = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = lengths[i] * (len(batch) + 1)
        if batch and (padded > budget or padded > PADDING * (own + lengths[i])):
            yield batch
            batch, own = [], 0
        batch.append(i)
        own += lengths[i]
    if batch:
        yield batch


def blocked_edges(rows: Sequence[Row], length: int) -> Bool[Tensor, "row query key"] | None:
    """The edges each row blocks, as a mask over whole prompts; None if no row blocks any."""
    if all(row.block is None for row in rows):
        return None
    blocked = torch.zeros(len(rows), length, length, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row.block is not None:
            blocked[i][torch.tensor(row.block.queries)[:, None], torch.tensor(row.block.keys)] = True
    return blocked


def blocks_at(rows: Sequence[Row], layer: int) -> Bool[Tensor, " row"]:
    """Which rows block their edges in this layer."""
    return torch.tensor(
        [row.block is not None and (row.block.layers is None or layer in row.block.layers) for row in rows]
    )


def wide(values: Tensor) -> Tensor:
    """Values in at least float32, in which probabilities and sums are taken."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
