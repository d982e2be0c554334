"""The attention function that reads and blocks edges of a model's own attention.

It is registered under the name `subjattn` with transformers' attention interface, so every
architecture that dispatches through it keeps its own projections, norms, rotary embeddings and
masks. The output is SDPA's, or plain arithmetic where scores are soft-capped or added to, or weights are looked at.
A `Tap` may, layer by layer,

* block edges (query, key) of each batch row before the softmax, so that the remaining weights
  renormalise (Geva et al. 2023), or add to their scores;
* keep the attention rows of chosen queries, `[row, head, query, key]`, in float32;
* see keys, values and mask of a base run, or attend in its own way (cones.py);
* see or change queries, keys and values as the function gets them (behind rotary and norms), the weights before they
  meet the values, and `z`, each as `[row, token, head, width]`.

A tap is seen only inside `tapped`; without one the function is plain SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Container, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subjattn.engine.interventions import Component, wide
from subjattn.errors import NotFired, UnsupportedModel


NAME = "subjattn"
_INPUTS: tuple[Component, ...] = ("q", "k", "v")
QUERIES_AT_ONCE = 128
"""Queries whose soft-capped scores are held at a time, so that memory grows with T, not with its square."""


Change = Callable[[Float[Tensor, "row token head width"]], Tensor | None]
"""A state in its place; None: leave it."""


@dataclass
class Tap:
    """What to block, keep and change in one forward pass; callables are told the layer.

    `change` is called with `q`, `k`, `v` and `z` of every layer, and with `pattern` in the layers `patterns`.
    """

    blocked: Callable[[int], Bool[Tensor, "row head query key"] | None] = lambda _layer: None
    added: Callable[[int], Float[Tensor, "row head query key"] | None] = lambda _layer: None
    keep_queries: Int[Tensor, "row query"] | None = None
    keep: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None
    attend: Callable[[int, Tensor, Tensor, Tensor, float, float | None, Change | None], Tensor] | None = None
    change: Callable[[Component, int, Tensor], Tensor | None] | None = None
    patterns: Container[int] = ()
    weights: dict[int, Float[Tensor, "row head query key"]] = field(default_factory=dict)
    seen: dict[int, nn.Module] = field(default_factory=dict)


_TAP: ContextVar[Tap | None] = ContextVar("subjattn_tap", default=None)


@contextmanager
def tapped(model: nn.Module, tap: Tap, layers: Collection[int] | None) -> Iterator[Tap]:
    """Let `model` attend through this module; the implementation it had comes back afterwards.

    Raises:
        UnsupportedModel: the model's attention does not dispatch through transformers' interface.
        NotFired: the layers that passed through the tap are not `layers` (None: any will do).
    """
    before = model.config._attn_implementation  # type: ignore[union-attr]
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    if model.config._attn_implementation != NAME:  # type: ignore[union-attr]
        raise UnsupportedModel(
            f"{type(model).__name__} does not reach its attention through transformers' attention interface, "
            "so its edges can be neither read nor blocked: use a model that does (Llama, Mistral, GPT-2, …)"
        )
    token = _TAP.set(tap)
    try:
        yield tap
    finally:
        _TAP.reset(token)
        model.set_attn_implementation(before)  # type: ignore[operator]
    if layers is not None and set(tap.seen) != set(layers):
        raise NotFired(f"attention of layers {sorted(set(layers) ^ set(tap.seen))} was not reached as it should be")


def _attention(
    module: nn.Module,
    query: Float[Tensor, "row head query d_head"],
    key: Float[Tensor, "row kv_head key d_head"],
    value: Float[Tensor, "row kv_head key d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Float[Tensor, "row query head d_head"], None]:
    for name in ("s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} changes its softmax by '{name}' (sinks or biases): its weights do not sum "
                "to one over the tokens, so attention to the subject is not defined"
            )
    tap, mask = _TAP.get(), attention_mask
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    layer, change_pattern, added = -1, None, None
    if tap is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        tap.seen[layer] = module
        query, key, value = (
            _changed(tap, component, layer, state.transpose(1, 2)).transpose(1, 2)
            for component, state in zip(_INPUTS, (query, key, value), strict=True)
        )
        if tap.keep is not None:
            tap.keep(layer, key, value, mask)
        mask, added = _without_edges(mask, tap.blocked(layer), query.shape[2], key.shape[2]), tap.added(layer)
        if tap.keep_queries is not None:
            tap.weights[layer] = _attention_rows(query, key, mask, tap.keep_queries, scale, softcap)
        if tap.change is not None and layer in tap.patterns:
            change_pattern = partial(tap.change, "pattern", layer)
    if tap is not None and tap.attend is not None:
        z = tap.attend(layer, query, key, value, scale, softcap, change_pattern)
    elif softcap is not None or change_pattern is not None or added is not None:
        z = _plain_attention(query, key, value, mask, scale, softcap, added, change_pattern)
    else:
        z = sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)[0]
    return z if tap is None else _changed(tap, "z", layer, z), None


def _changed(tap: Tap, component: Component, layer: int, state: Tensor) -> Tensor:
    changed = None if tap.change is None else tap.change(component, layer, state)
    return state if changed is None else changed


def grouped(
    query: Float[Tensor, "row head query d_head"], n_kv_heads: int
) -> Float[Tensor, "row kv_head group query d_head"]:
    """Query heads beside the key/value head they read: head h reads head `h // (n_heads // n_kv_heads)`."""
    return query.unflatten(1, (n_kv_heads, -1))  # type: ignore[no-any-return]


def capped(scores: Tensor, softcap: float | None) -> Tensor:
    """Scores squeezed into ±softcap (Gemma 2)."""
    return scores if softcap is None else (scores / softcap).tanh() * softcap


def _without_edges(
    mask: Tensor | None, blocked: Bool[Tensor, "row head query key"] | None, n_query: int, n_key: int
) -> Tensor | None:
    """The model's mask (None: plain causal) with edges taken out."""
    if blocked is None or not blocked.any():
        return mask
    allowed = ~blocked
    if mask is None:
        allowed = allowed & torch.ones(n_query, n_key, dtype=torch.bool, device=allowed.device).tril()
    elif mask.dtype == torch.bool:
        allowed = allowed & mask
    else:
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    check_some_key(allowed)
    return allowed


def check_some_key(allowed: Bool[Tensor, "... query key"]) -> None:
    """Refuse a query that nothing is left for: its softmax would be over nothing."""
    check_all([allowed.any(-1).all()])


def check_all(some_key: list[Bool[Tensor, ""]]) -> None:
    """Refuse queries that nothing is left for, of whom each tensor says whether there is none.

    Reads each device once: a value read in the middle of a grid would let the device wait.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for one in some_key:
        by_device.setdefault(one.device, []).append(one)
    if not all(read(torch.stack(some).all()) for some in by_device.values()):
        raise NotFired("a query would be left without any key to attend to; block fewer edges")


def read(value: Bool[Tensor, ""]) -> bool:
    """A value from its device."""
    return bool(value)


def _mask_rows(
    mask: Tensor | None, positions: Int[Tensor, "row query"], n_rows: int, n_key: int
) -> Bool[Tensor, "row head query key"]:
    """Which keys chosen queries may see."""
    if mask is None:
        return (torch.arange(n_key, device=positions.device) <= positions[..., None])[:, None]
    row = torch.arange(n_rows, device=positions.device)[:, None]
    allowed = mask if mask.dtype == torch.bool else mask == 0
    return allowed.expand(n_rows, -1, -1, -1).transpose(1, 2)[row, positions].transpose(1, 2)


def _attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Int[Tensor, "row query"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "row head query key"]:
    """Softmax rows of the chosen queries: memory grows with the keys, not with their square."""
    row, positions = torch.arange(query.shape[0], device=query.device)[:, None], positions.to(query.device)
    chosen = grouped(query.transpose(1, 2)[row, positions].transpose(1, 2), key.shape[1])
    scores = wide(chosen.flatten(2, 3)) @ wide(key.transpose(2, 3))
    scores = capped(scores.unflatten(2, chosen.shape[2:4]).flatten(1, 2) * scale, softcap)
    return scores.masked_fill(~_mask_rows(mask, positions, len(query), key.shape[2]), -torch.inf).softmax(-1)  # type: ignore[no-any-return]


def _plain_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    added: Float[Tensor, "row head query key"] | None,
    change: Change | None,
) -> Float[Tensor, "row query head d_head"]:
    """What SDPA has not: soft-caps and added scores, some queries at a time; changed weights, all of them at once."""
    n_kv, at_once = key.shape[1], QUERIES_AT_ONCE if change is None else query.shape[2]
    parts = []
    for start in range(0, query.shape[2], at_once):
        some = query[:, :, start : start + at_once]
        positions = torch.arange(start, start + some.shape[2], device=query.device).expand(len(query), -1)
        scores = grouped(some, n_kv) @ key.transpose(2, 3)[:, :, None]
        scores = capped(wide(scores).flatten(1, 2) * scale, softcap)
        if added is not None:
            scores = scores + added[:, :, start : start + at_once].to(scores)
        weights = scores.masked_fill(~_mask_rows(mask, positions, len(query), key.shape[2]), -torch.inf).softmax(-1)
        if change is not None and (changed := change(weights.transpose(1, 2))) is not None:
            weights = changed.transpose(1, 2)
        parts.append((grouped(weights.to(value), n_kv) @ value[:, :, None]).flatten(1, 2))
    return torch.cat(parts, 2).transpose(1, 2)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
