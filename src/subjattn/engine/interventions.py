"""Interventions as data: which edges to block or scale, which states to replace, in which run.

A run is one prompt under one arm, with or without noise; a row is a run under at most one block, one scale and any
patches. An intervention reaches only the layers and positions of its cone: from its first layer up, and from its
first position on. Whatever runs rows (cones.py, forward.py, the backends) yields `Output`s.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from subjattn.engine.noise import Noise, check_noise
from subjattn.errors import BadInput, NotFired
from subjattn.prompts import Prompt


Component = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern"]
COMPONENTS: tuple[Component, ...] = get_args(Component)
Part = Literal["qk", "vo", "mlp", "rest"]
"""Parts of a model's weights: what makes attention patterns, what they move, the MLP, and all others."""
OUTPUTS: frozenset[Component] = frozenset({"resid_post", "attn_out", "mlp_out"})
"""Components that a layer, or a module of one, returns."""
BY_HEAD: frozenset[Component] = frozenset({"z", "q", "k", "v", "pattern"})
"""Components that belong to one head: a query head, or of `k` and `v` a key/value head."""
FROM_THE_SAME_PLACE: frozenset[Component] = frozenset({"q", "k", "pattern"})
"""Components that hold where they stand, so that they are patched at the same position only."""
_READ_LATER: frozenset[Component] = frozenset({"k", "v"})
"""Components that every later position of their own layer reads."""
BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: well under 1 GB of working memory for a model of 135 M."""
PADDING = 1.25
"""A batch holds at most this many times its own tokens, so that short rows do not pay for long ones."""
SMALL = 256
"""Up to this many tokens padding is free: reading the weights takes longer than the arithmetic."""


@dataclass(frozen=True)
class Edges:
    """Attention edges (query, key), in `heads` of `layers` (None: all) or in the very `cells` (layer, head)."""

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
        **how: Any,
    ) -> Self:
        """Every edge from `queries` to `keys` that a causal model has; `how` is what the kind of edges asks for."""
        keys = tuple(keys)
        return cls(frozenset((query, key) for query in queries for key in keys if key <= query), layers, heads, **how)

    def heads_at(self, layer: int) -> tuple[int, ...] | None:
        """Heads whose edges these are in a layer; None: all of them."""
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
class Arm:
    """Whose weights a run goes by: those of a tuned model (see arms.py), all of them or only some.

    `cells` are the parts (layer, part) that are tuned, -1 being outside the decoder layers; `positions` the tokens
    that go by tuned weights, which the others read as they are. None: all.
    """

    name: str
    cells: frozenset[tuple[int, Part]] | None = None
    positions: frozenset[int] | None = None


@dataclass(frozen=True)
class Block(Edges):
    """Edges blocked before the softmax, so that the remaining weights renormalise (Geva et al. 2023)."""


@dataclass(frozen=True)
class Scale(Edges):
    """Edges to whose attention score `add` is added: behind scaling and soft-cap, before the softmax.

    `add=times(2)` doubles their weights, and the row renormalises.
    """

    add: float = field(kw_only=True)


def times(factor: float) -> float:
    """What added to scores multiplies the weights, before the row renormalises: log `factor`.

    Raises:
        BadInput: the factor is not positive; 0 is a `Block`.
    """
    if not 0 < factor < math.inf:
        raise BadInput(f"weights times {factor}: give a positive factor, or block the edges (factor 0)")
    return math.log(factor)


@dataclass(frozen=True)
class Run:
    """A prompt under one arm: what base runs, controls and the sources of patches are known by.

    An `arm` of None is the model itself; `noise` is on its embeddings.
    """

    prompt: Prompt
    arm: Arm | None = None
    noise: Noise | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """The output of a component replaced at `positions` of one layer.

    `values` are `[position, width]`, or the run that they are taken from, at `source_positions` (None: the
    same positions); a prompt stands for its run under the row's own arm, without noise. Components: `resid_pre` and
    `resid_post`, the residual stream before and after the layer; `attn_out` and `mlp_out`, what its
    attention and its MLP return; and of one `head`, as its attention function gets or gives them: `q`, and `k` and
    `v` of a key/value head (which query heads may share), behind norms and rotary; `pattern`, the attention weights
    of the query at that position, `[position, key]` over keys 0 to the last of the positions and more where 0, which
    then meet the patched run's own values; `z`, what the head gives to W_O. `q`, `k` and `pattern` hold where they
    stand, and are taken from the same positions only.
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

    def source(self, arm: Arm | None) -> Run | None:
        """The run that gives the values, in a row of this arm; None where they are brought along."""
        if isinstance(self.values, Prompt):
            return Run(self.values, arm)
        return self.values if isinstance(self.values, Run) else None


@dataclass(frozen=True, eq=False)
class Row:
    """One run under at most one block, one scale and any patches; `contrast` is a token and its foil.

    Where a block and a scale take the same edge, it is blocked.
    """

    prompt: Prompt
    block: Block | None = None
    patches: tuple[Patch, ...] = ()
    contrast: tuple[int, int] | None = None
    arm: Arm | None = None
    scale: Scale | None = None
    noise: Noise | None = None

    @property
    def run(self) -> Run:
        return Run(self.prompt, self.arm, self.noise)

    @property
    def edges(self) -> list[Edges]:
        """Its block and its scale, where it has them."""
        return [edges for edges in (self.block, self.scale) if edges is not None]

    @property
    def plain(self) -> bool:
        """Whether nothing is done within its run, whose noise is its own."""
        return not self.edges and not self.patches

    @property
    def sources(self) -> list[Run]:
        """Runs that give patches their values, each once."""
        found = (patch.source(self.arm) for patch in self.patches)
        return list(dict.fromkeys(source for source in found if source is not None))

    @property
    def first_layer(self) -> int:
        """The lowest layer whose computation differs from the base run's."""
        layers = [patch.layer for patch in self.patches] + [edges.first_layer for edges in self.edges]
        return min(layers, default=0)

    @property
    def suffix(self) -> range:
        """Positions from the first that differs from the base run to the last that predicts an answer token."""
        positions = [self.prompt.prediction]
        positions += [position for patch in self.patches for position in patch.positions]
        positions += [query for edges in self.edges for query, _ in edges.edges]
        return range(min(positions), self.prompt.predicting[-1] + 1)

    @property
    def touched(self) -> Sequence[int]:
        """Positions of the suffix that leave the first layer changed.

        Only the residual stream before it, keys and values change what later positions read in it.
        """
        first, last = self.first_layer, self.prompt.predicting[-1]
        positions: set[int] = set()
        for patch in self.patches:
            if patch.layer == first:
                if patch.component == "resid_pre":
                    return self.suffix
                positions.update(patch.positions)
                if patch.component in _READ_LATER:
                    positions.update(range(min(patch.positions), last + 1))
        for edges in self.edges:
            if edges.acts_at(first):
                positions.update(query for query, _ in edges.edges if query <= last)
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


def check_rows(rows: Sequence[Row], n_layers: int, n_heads: int, n_kv_heads: Sequence[int]) -> None:
    """Refuse an intervention that lies outside its prompt or model, where it would silently do nothing.

    Args:
        rows: what is asked.
        n_layers: of the model.
        n_heads: query heads of a layer.
        n_kv_heads: key/value heads of each layer.

    Raises:
        NotFired: such an intervention.
    """
    check_noise(run for row in rows for run in (row.run, *row.sources))
    for row in rows:
        length, last = len(row.prompt), row.prompt.predicting[-1]
        for its in row.edges:
            cells = its.cells or ()
            layers, heads = [*(its.layers or ()), *dict(cells)], [*(its.heads or ()), *(head for _, head in cells)]
            inside = [0 <= key <= query < length for query, key in its.edges]
            inside += [0 <= layer < n_layers for layer in layers] + [0 <= head < n_heads for head in heads]
            inside += [its.cells is None or its.layers is None is its.heads]
            empty = not its.edges or its.layers == () or its.heads == () or its.cells == frozenset()
            if empty or not all(inside) or min(query for query, _ in its.edges) > last:
                raise NotFired(
                    f"fact {row.prompt.fact_id}: the {'blocked' if its is row.block else 'scaled'} edges are empty, or "
                    "lie outside the prompt or model"
                )
        if row.scale is not None and not math.isfinite(row.scale.add):
            raise NotFired(
                f"fact {row.prompt.fact_id}: {row.scale.add} cannot be added to scores: give a finite number, or block "
                "the edges"
            )
        for patch in row.patches:
            inside = [0 <= patch.layer < n_layers, bool(patch.positions)]
            inside += [0 <= position <= last for position in patch.positions]
            heads_there = range(n_heads)
            if all(inside) and patch.component in _READ_LATER:
                heads_there = range(n_kv_heads[patch.layer])
            inside += [(patch.head in heads_there) if patch.component in BY_HEAD else patch.head is None]
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
            if patch.component in FROM_THE_SAME_PLACE and tuple(patch.taken_at) != tuple(patch.positions):
                raise NotFired(
                    f"fact {row.prompt.fact_id}: a patch of {patch.component} is taken from other positions than it is "
                    "put at, and holds where it stands (rotary, or the row's keys): leave source_positions out"
                )
            if patch.component == "pattern" and source is None:
                _check_pattern(row, patch)
        places = Counter((p.component, p.layer, p.head, position) for p in row.patches for position in p.positions)
        if twice := [place for place, n in places.items() if n > 1]:
            raise NotFired(
                f"fact {row.prompt.fact_id}: two patches write to one place, {twice[0]}: leave one of them out"
            )


def _check_pattern(row: Row, patch: Patch) -> None:
    """Refuse weights of keys that a query of a causal model has not."""
    weights: Tensor = patch.values  # type: ignore[assignment]
    n_key = weights.shape[-1]
    later = torch.arange(n_key, device=weights.device) > torch.tensor(patch.positions, device=weights.device)[:, None]
    if n_key <= max(patch.positions) or bool((weights * later).any()):
        raise NotFired(
            f"fact {row.prompt.fact_id}: a pattern of {n_key} keys for positions {patch.positions} lacks keys, or has "
            "weight on later ones: give [position, key] over keys 0 to the last position, 0 behind the query's own"
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


def edge_mask(edges: Edges | None, length: int) -> Bool[Tensor, "query key"]:
    """Edges as a mask over the whole prompt."""
    mask = torch.zeros(length, length, dtype=torch.bool)
    if edges is not None:
        queries, keys = zip(*edges.edges, strict=True)
        mask[torch.tensor(queries), torch.tensor(keys)] = True
    return mask


def fitted(component: Component, values: Tensor, state: Tensor) -> Tensor:
    """A component's values in the width and precision of the state they go into: patterns over as many keys."""
    if component == "pattern":
        values = nn.functional.pad(values, (0, state.shape[-1] - values.shape[-1]))
    return values.to(state)


def wide(values: Tensor) -> Tensor:
    """Values in at least float32, in which probabilities and sums are taken."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
