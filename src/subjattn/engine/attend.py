"""Attention of cones: each token reads its cone's own keys, and the base run's where the cone has none.

The base run's keys are shared by all cones of a run and never copied: queries of one run meet
them in one matrix product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from subjattn.engine.attention import Change, capped, check_all, grouped
from subjattn.engine.base import Base
from subjattn.engine.interventions import Edges, Row, edge_mask, wide


_At = tuple[Bool[Tensor, "token key"], Bool[Tensor, "token head"] | None]


@dataclass(frozen=True)
class _Chosen:
    """Edges of the rows of some cones: `[token, key]`, in which layers of a row `[layer, row]`, in which heads of it.

    `heads` is `[layer, row, head]`, or None where all rows take all heads. All of it is kept on the host.
    """

    edges: Bool[Tensor, "token key"]
    acts: Bool[Tensor, "layer row"]
    heads: Bool[Tensor, "layer row head"] | None

    @classmethod
    def of(
        cls,
        chosen: Sequence[Edges | None],
        suffixes: Sequence[range],
        n_layers: int,
        n_heads: int,
        length: int,
        n_key: int,
    ) -> _Chosen | None:
        """Those of rows with these suffixes; None if there are none."""
        if all(edges is None for edges in chosen):
            return None
        rows = [edge_mask(edges, length)[s.start : s.stop, :n_key] for edges, s in zip(chosen, suffixes, strict=True)]
        acts = torch.tensor([[edges is not None and edges.acts_at(at) for edges in chosen] for at in range(n_layers)])
        heads = None
        if any(edges.heads is not None or edges.cells is not None for edges in chosen if edges is not None):
            heads = torch.zeros(n_layers, len(chosen), n_heads, dtype=torch.bool)
            for layer, i in acts.nonzero().tolist():
                some = chosen[i].heads_at(layer)  # type: ignore[union-attr]
                heads[layer, i, slice(None) if some is None else list(some)] = True
        return cls(torch.cat(rows), acts, heads)

    def at(self, layer: int, tokens: Int[Tensor, " token"], cones: Int[Tensor, " token"]) -> _At | None:
        """Edges `[token, key]` of some tokens of these cones in a layer, and in which heads; None if there are none."""
        if not self.acts[layer].any():
            return None
        return self.edges[tokens] & self.acts[layer][cones][:, None], (
            None if self.heads is None else self.heads[layer, cones]
        )


class Tokens:
    """Tokens of all cones, one cone's suffix after another, and those that pass through the present layer.

    `offsets` says where each cone begins; `run` (row of the base), `position` and `cone` belong to each token.
    What is known beforehand is kept on the host, where nothing has to wait for a device. `select` chooses the tokens
    of one layer and brings what belongs to them to its device: `flat`, and `run_at`, `position_at`, `cone_at`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        runs: Sequence[int],
        suffixes: Sequence[range],
        *,
        length: int,
        n_layers: int,
        n_heads: int,
    ) -> None:
        sizes = torch.tensor([len(suffix) for suffix in suffixes])
        self.sizes, self.starts = sizes, sizes.cumsum(0) - sizes
        self.offsets = [0, *accumulate(sizes.tolist())]
        self.cone = torch.repeat_interleave(torch.arange(len(rows)), sizes)
        self.run = torch.tensor(runs)[self.cone]
        self.position = torch.cat([torch.arange(suffix.start, suffix.stop) for suffix in suffixes])
        self.n_key = int(self.position.max()) + 1
        shape = (n_layers, n_heads, length, self.n_key)
        self.blocked = _Chosen.of([row.block for row in rows], suffixes, *shape)
        self.scaled = _Chosen.of([row.scale for row in rows], suffixes, *shape)
        self.add = torch.tensor([0.0 if row.scale is None else row.scale.add for row in rows], dtype=torch.float64)
        self.some_key: list[Tensor] = []

    def suffixes(self, cones: list[int]) -> Int[Tensor, " token"]:
        """All tokens of some cones, on the host."""
        sizes, offsets = self.sizes[cones], self.starts[cones]
        shift = torch.repeat_interleave(offsets - (sizes.cumsum(0) - sizes), sizes)
        return torch.arange(len(shift)) + shift

    def select(self, flat: Int[Tensor, " token"], n_own: list[int], device: torch.device) -> None:
        """Choose the tokens of one pass through a layer, `n_own` of each cone; those of a run lie together."""
        self.selected, self.device = flat, device
        self.flat, self.run_at, self.position_at = (of.to(device) for of in (flat, self.run[flat], self.position[flat]))
        sizes = torch.tensor(n_own)
        starts = sizes.cumsum(0) - sizes
        steps = torch.arange(int(sizes.max()))
        # Of each cone, its tokens among the selected; shorter ones repeat their last, which `valid` marks.
        self.own = (starts[:, None] + steps.minimum(sizes[:, None] - 1)).to(device)
        row = torch.repeat_interleave(torch.arange(len(sizes)), sizes)
        self.valid = (steps < sizes[:, None])[row].to(device)
        self.row, self.step = row.to(device), (torch.arange(len(flat)) - starts[row]).to(device)
        # Of each token, where its cone's own keys stand, and which of the base run's keys they take the place of.
        own_positions = self.position_at[self.own]
        in_cone = torch.zeros(len(sizes), self.n_key, dtype=torch.bool, device=device).scatter_(1, own_positions, True)
        self.own_positions, self.in_cone = own_positions[self.row], in_cone[self.row]
        runs, counts = self.run[flat].unique_consecutive(return_counts=True)
        ends = [0, *accumulate(counts.tolist())]
        self.by_run = [(p, slice(a, b)) for p, a, b in zip(runs.tolist(), ends, ends[1:], strict=False)]

    def blocked_at(self, layer: int) -> tuple[Tensor, Tensor | None] | None:
        """Edges `[token, key]` that the selected tokens lose in a layer, and in which heads; None if none do."""
        found = None if self.blocked is None else self.blocked.at(layer, self.selected, self.cone[self.selected])
        if found is None:
            return None
        edges, heads = found
        return edges.to(self.device), None if heads is None else heads.to(self.device)

    def added_at(self, layer: int) -> Float[Tensor, "token one_or_head key"] | None:
        """What the selected tokens' scores gain in a layer; None if none do."""
        cone = self.cone[self.selected]
        found = None if self.scaled is None else self.scaled.at(layer, self.selected, cone)
        if found is None:
            return None
        edges, heads = found
        chosen = edges[:, None] if heads is None else edges[:, None] & heads[..., None]
        return (chosen * self.add[cone][:, None, None]).to(torch.float32).to(self.device)

    def among_selected(self, flat: Int[Tensor, " token"]) -> Int[Tensor, " token"]:
        """Where tokens stand among the selected, -1 for those that do not; on the host."""
        where = torch.full((self.offsets[-1],), -1)
        where[self.selected] = torch.arange(len(self.selected))
        return where[flat]

    def check_some_key(self) -> None:
        """Refuse queries that nothing was left for; what the layers found is read here, once."""
        check_all(self.some_key)


def attend(
    base: Base,
    tokens: Tokens,
    layer: int,
    query: Float[Tensor, "one head token d_head"],
    key: Float[Tensor, "one kv_head token d_head"],
    value: Float[Tensor, "one kv_head token d_head"],
    scale: float,
    softcap: float | None,
    change: Change | None = None,
) -> Float[Tensor, "one token head d_head"]:
    """`z` of the selected tokens, softmax over base keys and own keys together, in at least float32.

    `change` is shown the weights as `[one, token, head, key]`, own keys in their places among the base run's.
    """
    n_kv, n_key = key.shape[1], tokens.n_key
    queries, keys, values = wide(grouped(query, n_kv)[0]), wide(key[0]), wide(value[0])
    n_group, n_token, d_head = queries.shape[1:]
    longest = tokens.own.shape[1]
    scores = queries.new_empty(n_token, n_kv, n_group, n_key + longest)
    for run, some in tokens.by_run:
        shared = wide(base.keys[layer][run, :, :n_key])
        found = queries[:, :, some].flatten(1, 2) @ shared.transpose(1, 2)
        scores[some, ..., :n_key] = found.unflatten(1, (n_group, -1)).permute(2, 0, 1, 3)
    own_keys, own_values = keys[:, tokens.own], values[:, tokens.own]
    own_queries = queries[:, :, tokens.own].transpose(1, 2).flatten(2, 3)
    found = (own_queries @ own_keys.transpose(2, 3)).unflatten(2, (n_group, longest))
    scores[..., n_key:] = found.permute(1, 3, 0, 2, 4)[tokens.row, tokens.step]

    allowed = _allowed(base, tokens, layer)
    scores = capped(scores.mul_(scale), softcap)
    if (added := tokens.added_at(layer)) is not None:
        scores += _apart(tokens, added).unflatten(1, (n_kv if added.shape[1] > 1 else 1, -1))
    weights = scores.masked_fill_(~allowed, -torch.inf).softmax(-1)
    if change is not None and (changed := change(_in_places(tokens, weights))) is not None:
        weights = _apart(tokens, changed[0]).view_as(weights)

    z = values.new_empty(n_token, n_kv, n_group, d_head)
    for run, some in tokens.by_run:
        shared = wide(base.values[layer][run, :, :n_key])
        found = weights[some, ..., :n_key].permute(1, 2, 0, 3).flatten(1, 2) @ shared
        z[some] = found.unflatten(1, (n_group, -1)).permute(2, 0, 1, 3)
    own_weights = weights[..., n_key:][tokens.own].permute(2, 0, 3, 1, 4).flatten(2, 3)
    found = (own_weights @ own_values).unflatten(2, (n_group, longest))
    z += found.permute(1, 3, 0, 2, 4)[tokens.row, tokens.step]
    return z.flatten(1, 2).to(value)[None]


def _apart(tokens: Tokens, seen: Tensor) -> Tensor:
    """What belongs to keys, for base keys outside the cone and then for the cone's own; 0 (False) where none is."""
    shape = (len(seen), *[1] * (seen.ndim - 2), -1)
    own = seen.gather(-1, tokens.own_positions.view(shape).expand(*seen.shape[:-1], -1))
    return torch.cat([seen * ~tokens.in_cone.view(shape), own * tokens.valid.view(shape)], -1)


def _in_places(
    tokens: Tokens, weights: Float[Tensor, "token kv_head group both"]
) -> Float[Tensor, "one token head key"]:
    """Weights of base keys and of the cone's own as those of one row of keys."""
    base, own = weights.flatten(1, 2).split([tokens.n_key, tokens.own.shape[1]], -1)
    placed: Tensor = base.scatter_add(-1, tokens.own_positions[:, None].expand_as(own), own)
    return placed[None]


def _allowed(base: Base, tokens: Tokens, layer: int) -> Tensor:
    """What each selected token may read, `[token, 1 or kv_head, 1 or group, base key + own key]`."""
    allowed = base.visible(layer, tokens.run_at, tokens.position_at, tokens.n_key)
    blocked = tokens.blocked_at(layer)
    if blocked is None:
        return _apart(tokens, allowed)[:, None, None]
    edges, heads = blocked
    if heads is None:
        allowed = _apart(tokens, allowed & ~edges)
    else:
        allowed = _apart(tokens, allowed[:, None] & ~(edges[:, None] & heads[..., None]))
    tokens.some_key.append(allowed.any(-1).all())
    if heads is None:
        return allowed[:, None, None]
    return allowed.unflatten(1, (base.keys[layer].shape[1], -1))  # type: ignore[no-any-return]
