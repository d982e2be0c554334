"""Interventions as data: which edges to block, which states to replace, in which run.

A run is one prompt under one arm, with or without noise; a row is a run under at most one block and any patches. An
intervention reaches only the layers and positions of its cone: from its first layer up, and from its
first position on. Whatever runs rows (cones.py, forward.py, the backends) yields `Output`s.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from subjattn.engine.noise import Noise, check_noise
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.prompts import Prompt


Component = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
OUTPUTS: frozenset[Component] = frozenset({"resid_post", "attn_out", "mlp_out"})
"""Components that a layer, or a module of one, returns."""
BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: well under 1 GB of working memory for a model of 135 M."""
PADDING = 1.25
"""A batch holds at most this many times its own tokens, so that short rows do not pay for long ones."""
SMALL = 256
"""Up to this many tokens padding is free: reading the weights takes longer than the arithmetic."""


@dataclass(frozen=True)
class Block:
    """Attention edges (query, key) blocked before the softmax.

    Either in `heads` of `layers` (None: all), or in the very `cells` (layer, head).
    """

    edges: frozenset[tuple[int, int]]
    layers: tuple[int, ...] | None = None
    heads: tuple[int, ...] | None = None
    cells: frozenset[tuple[int, int]] | None = None

    @classmethod
    def between(
        cls,
        queries: Iterable[int],
        keys: Iterable[int],
        layers: tuple[int, ...] | None = None,
        heads: tuple[int, ...] | None = None,
    ) -> Block:
        """Every edge from `queries` to `keys` that a causal model has."""
        keys = tuple(keys)
        return cls(frozenset((query, key) for query in queries for key in keys if key <= query), layers, heads)

    def heads_at(self, layer: int) -> tuple[int, ...] | None:
        """Heads that lose the edges in a layer; None: all of them."""
        if self.cells is not None:
            return tuple(sorted(head for at, head in self.cells if at == layer))
        return self.heads if self.layers is None or layer in self.layers else ()

    def acts_at(self, layer: int) -> bool:
        return self.heads_at(layer) != ()

    @property
    def first_layer(self) -> int:
        layers = self.layers if self.cells is None else [layer for layer, _ in self.cells]
        return 0 if layers is None else min(layers)


@dataclass(frozen=True)
class Run:
    """A prompt under one arm: what base runs, controls and the sources of patches are known by.

    `arm` names one of several models in a batch; None is the model itself. `noise` is on its embeddings.
    """

    prompt: Prompt
    arm: str | None = None
    noise: Noise | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """The output of a component replaced at `positions` of one layer.

    `values` are `[position, width]`, or the run that they are taken from, at `source_positions` (None: the
    same positions); a prompt stands for its run under the row's own arm, without noise. Components: `resid_pre` and
    `resid_post`, the residual stream before and after the layer; `attn_out` and `mlp_out`, what its
    attention and its MLP return; `z`, what one `head` reads before W_O (width d_head).
    """

    layer: int
    positions: tuple[int, ...]
    values: Float[Tensor, "position width"] | Run | Prompt
    component: Component = "resid_pre"
    head: int | None = None
    source_positions: tuple[int, ...] | None = None

    @property
    def taken_at(self) -> tuple[int, ...]:
        """Positions of the run that values are taken from."""
        return self.positions if self.source_positions is None else self.source_positions

    def source(self, arm: str | None) -> Run | None:
        """The run that gives the values, in a row of this arm; None where they are brought along."""
        if isinstance(self.values, Prompt):
            return Run(self.values, arm)
        return self.values if isinstance(self.values, Run) else None


@dataclass(frozen=True, eq=False)
class Row:
    """One run under at most one block and any patches; `contrast` is a token and its foil."""

    prompt: Prompt
    block: Block | None = None
    patches: tuple[Patch, ...] = ()
    contrast: tuple[int, int] | None = None
    arm: str | None = None
    noise: Noise | None = None

    @property
    def run(self) -> Run:
        return Run(self.prompt, self.arm, self.noise)

    @property
    def plain(self) -> bool:
        """Whether nothing is done within its run, whose noise is its own."""
        return self.block is None and not self.patches

    @property
    def sources(self) -> list[Run]:
        """Runs that give patches their values, each once."""
        found = (patch.source(self.arm) for patch in self.patches)
        return list(dict.fromkeys(source for source in found if source is not None))

    @property
    def first_layer(self) -> int:
        """The lowest layer whose computation differs from the base run's."""
        layers = [patch.layer for patch in self.patches]
        layers += [] if self.block is None else [self.block.first_layer]
        return min(layers, default=0)

    @property
    def suffix(self) -> range:
        """Positions from the first that differs from the base run to the last that predicts an answer token."""
        positions = [self.prompt.prediction]
        positions += [position for patch in self.patches for position in patch.positions]
        positions += [] if self.block is None else [query for query, _ in self.block.edges]
        return range(min(positions), self.prompt.predicting[-1] + 1)

    @property
    def touched(self) -> Sequence[int]:
        """Positions of the suffix that leave the first layer changed.

        Only the residual stream before it changes its keys and values, and so every later position.
        """
        first, last = self.first_layer, self.prompt.predicting[-1]
        positions: set[int] = set()
        for patch in self.patches:
            if patch.layer == first:
                if patch.component == "resid_pre":
                    return self.suffix
                positions.update(patch.positions)
        if self.block is not None and self.block.acts_at(first):
            positions.update(query for query, _ in self.block.edges if query <= last)
        return sorted(positions)


@dataclass
class Output:
    """What a batch of rows gave; `index` says where its rows stand among those asked for.

    `logits` has one line for every position that predicts an answer token, row after row; where only
    contrasts were asked for, one line a row, its token and its foil. `control` are the same runs
    without an intervention, run in the same batch; `control_of` says which belongs to a row.
    """

    index: list[int]
    rows: list[Row]
    logits: Float[Tensor, "prediction vocab"]
    control: Output | None = None
    control_of: list[int] = field(default_factory=list)
    attention: dict[int, Float[Tensor, "row head query key"]] = field(default_factory=dict)
    value_norms: dict[int, Float[Tensor, "row head key"]] = field(default_factory=dict)


def check_rows(rows: Sequence[Row], n_layers: int, n_heads: int) -> None:
    """Refuse an intervention that lies outside its prompt or model, where it would silently do nothing.

    Raises:
        NotFired: such an intervention.
        UnsupportedModel: a row of another arm than the model's own.
    """
    check_arms(rows)
    check_noise(run for row in rows for run in (row.run, *row.sources))
    for row in rows:
        length, last = len(row.prompt), row.prompt.predicting[-1]
        if (block := row.block) is not None:
            cells = block.cells or ()
            layers, heads = [*(block.layers or ()), *dict(cells)], [*(block.heads or ()), *(head for _, head in cells)]
            inside = [0 <= key <= query < length for query, key in block.edges]
            inside += [0 <= layer < n_layers for layer in layers] + [0 <= head < n_heads for head in heads]
            inside += [block.cells is None or block.layers is None is block.heads]
            empty = not block.edges or block.layers == () or block.heads == () or block.cells == frozenset()
            if empty or not all(inside) or min(query for query, _ in block.edges) > last:
                raise NotFired(
                    f"fact {row.prompt.fact_id}: the blocked edges are empty, or lie outside the prompt or model"
                )
        for patch in row.patches:
            inside = [0 <= patch.layer < n_layers, bool(patch.positions)]
            inside += [0 <= position <= last for position in patch.positions]
            inside += [(patch.head is not None and 0 <= patch.head < n_heads) == (patch.component == "z")]
            if not all(inside):
                raise NotFired(
                    f"fact {row.prompt.fact_id}: a patch of {patch.component} in layer {patch.layer}, head "
                    f"{patch.head}, at positions {patch.positions} lies outside the prompt or model"
                )
            inside = [len(patch.taken_at) == len(patch.positions), min(patch.taken_at) >= 0]
            if (source := patch.source(row.arm)) is not None:
                inside += [max(patch.taken_at) < len(source.prompt)]
            if not all(inside):
                raise NotFired(
                    f"fact {row.prompt.fact_id}: the prompt patched from is too short, or its positions do not match"
                )
        places = Counter((p.component, p.layer, p.head, position) for p in row.patches for position in p.positions)
        if twice := [place for place, n in places.items() if n > 1]:
            raise NotFired(
                f"fact {row.prompt.fact_id}: two patches write to one place, {twice[0]}: leave one of them out"
            )


def check_arms(rows: Sequence[Row]) -> None:
    """Refuse arms that a model by itself has not: their numbers would be its own."""
    for run in (run for row in rows for run in (row.run, *row.sources)):
        if run.arm is not None:
            raise UnsupportedModel(
                f"fact {run.prompt.fact_id}: a row of arm {run.arm!r} was asked of a single model, which would answer "
                "in its place: measure each arm with its own model, and leave the row's arm out"
            )


def batches(lengths: Sequence[int], budget: int, padding: float = PADDING) -> Iterator[list[int]]:
    """Indices grouped by similar length, within a budget of tokens and little padding (see `PADDING`)."""
    batch: list[int] = []
    own = 0
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        padded = lengths[i] * (len(batch) + 1)
        if batch and (padded > budget or padded > max(SMALL, padding * (own + lengths[i]))):
            yield batch
            batch, own = [], 0
        batch.append(i)
        own += lengths[i]
    if batch:
        yield batch


def pieces(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows whose sizes add up to no more than a limit, or one row that alone exceeds it."""
    start = total = 0
    for i, size in enumerate(sizes):
        if i > start and total + size > limit:
            yield start, i
            start, total = i, 0
        total += size
    if sizes:
        yield start, len(sizes)


def controls(rows: Sequence[Row]) -> tuple[list[Row], list[int]]:
    """Each run and contrast among `rows` once, without an intervention, and which one belongs to a row."""
    found: dict[tuple[Run, tuple[int, int] | None], int] = {}
    of = [found.setdefault((row.run, row.contrast), len(found)) for row in rows]
    return [Row(run.prompt, contrast=contrast, arm=run.arm, noise=run.noise) for run, contrast in found], of


def blocked_edges(row: Row, length: int) -> Bool[Tensor, "query key"]:
    """The edges a row blocks, as a mask over the whole prompt."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    if row.block is not None:
        queries, keys = zip(*row.block.edges, strict=True)
        mask[torch.tensor(queries), torch.tensor(keys)] = True
    return mask


def wide(values: Tensor) -> Tensor:
    """Values in at least float32, in which probabilities and sums are taken."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
