"""The attention function that reads and blocks edges of a model's own attention.

It is registered under the name `subjattn` with transformers' attention interface, so every
architecture that dispatches through it keeps its own projections, norms, rotary embeddings and
masks. The output is SDPA's. A `Tap` may, layer by layer,

* block edges (query, key) of each batch row before the softmax, so that the remaining weights
  renormalise (Geva et al. 2023);
* keep the attention rows of chosen queries, `[row, head, query, key]`, in float32;
* keep keys, values and mask of a base run, or put them beside a cone's own (cones.py).

A tap is seen only inside `tapped`; without one the function is plain SDPA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from subjattn.errors import NotFired, UnsupportedModel


NAME = "subjattn"


@dataclass
class Tap:
    """What to block and what to keep in one forward pass; callables are told the layer."""

    blocked: Callable[[int], Bool[Tensor, "row query key"] | None] = lambda _layer: None
    keep_queries: Int[Tensor, "row query"] | None = None
    keep: Callable[[int, Tensor, Tensor, Tensor | None], None] | None = None
    join: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None
    weights: dict[int, Float[Tensor, "row head query key"]] = field(default_factory=dict)
    seen: set[int] = field(default_factory=set)


_TAP: ContextVar[Tap | None] = ContextVar("subjattn_tap", default=None)


@contextmanager
def tapped(model: nn.Module, tap: Tap, layers: range) -> Iterator[Tap]:
    """Let `model` attend through this module; the implementation it had comes back afterwards.

    Raises:
        UnsupportedModel: the model's attention does not dispatch through transformers' interface.
        NotFired: one of `layers` did not pass through the tap.
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
    if tap.seen != set(layers):
        raise NotFired(f"attention of layers {sorted(set(layers) ^ tap.seen)} was not reached as it should be")


def _attention(
    module: nn.Module,
    query: Float[Tensor, "row head query d_head"],
    key: Float[Tensor, "row kv_head key d_head"],
    value: Float[Tensor, "row kv_head key d_head"],
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Float[Tensor, "row query head d_head"], None]:
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise UnsupportedModel(
                f"{type(module).__name__} changes its scores by '{name}', which is not supported yet"
            )
    tap, mask = _TAP.get(), attention_mask
    if tap is not None:
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        tap.seen.add(layer)
        if tap.keep is not None:
            tap.keep(layer, key, value, mask)
        if tap.join is not None:
            key, value, mask = tap.join(layer, key, value)
        mask = _without_edges(mask, tap.blocked(layer), query.shape[2], key.shape[2])
        if tap.keep_queries is not None:
            tap.weights[layer] = _attention_rows(query, key, mask, tap.keep_queries, scaling)
    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[no-any-return]


def _without_edges(
    mask: Tensor | None, blocked: Bool[Tensor, "row query key"] | None, n_query: int, n_key: int
) -> Tensor | None:
    """The model's mask (None: plain causal) with edges taken out."""
    if blocked is None or not blocked.any():
        return mask
    allowed = ~blocked[:, None]
    if mask is None:
        allowed = allowed & torch.ones(n_query, n_key, dtype=torch.bool, device=allowed.device).tril()
    elif mask.dtype == torch.bool:
        allowed = allowed & mask
    else:
        return mask.masked_fill(~allowed, torch.finfo(mask.dtype).min)
    if not allowed.any(-1).all():
        raise NotFired("a query would be left without any key to attend to; block fewer edges")
    return allowed


def _attention_rows(
    query: Tensor, key: Tensor, mask: Tensor | None, positions: Int[Tensor, "row query"], scaling: float | None
) -> Float[Tensor, "row head query key"]:
    """Softmax rows of the chosen queries: memory grows with the keys, not with their square."""
    row = torch.arange(query.shape[0], device=query.device)[:, None]
    chosen = query.transpose(1, 2)[row, positions].transpose(1, 2)
    keys = repeat_kv(key, query.shape[1] // key.shape[1])
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    scores = (chosen @ keys.transpose(2, 3)).float() * scale
    if mask is None:
        after = torch.arange(key.shape[2], device=key.device) > positions[..., None]
        scores = scores.masked_fill(after[:, None], -torch.inf)
    else:
        full = mask.expand(query.shape[0], -1, -1, -1).transpose(1, 2)[row, positions].transpose(1, 2)
        scores = scores.masked_fill(~full, -torch.inf) if full.dtype == torch.bool else scores + full
    return scores.softmax(-1)


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
