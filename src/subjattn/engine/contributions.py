"""What attention and MLP of every layer add to the residual stream at the prediction position, and each head of it.

`attn_out` and `mlp_out` are what those modules return. What a layer *adds* may be something else: behind them Gemma 2
and 3, OLMo 2 and GLM-4 put norms, Granite a factor. Here is what is added, so that what the last layer gives is the sum
of the embedding and all contributions; a model in which it is not is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import (
    attention_module,
    decoder_layers,
    mlp_module,
    on_input,
    only_positions,
    output_projections,
    padded_ids,
)
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.checks import LAYER_TOLERANCE, check_model
from subjattn.engine.frozen import Frozen
from subjattn.engine.interventions import BATCH_TOKENS, Component, batches
from subjattn.engine.unembed import layers_giving
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


ONE = 1e-2
"""A factor this near to 1 is 1, and what parts it from 1 is rounding."""


@dataclass(frozen=True)
class Heads:
    """How one layer's heads write to the stream: rows of attention, values, W_O and what follows it."""

    pattern: Float[Tensor, "row head key"]
    values: Float[Tensor, "row key kv_head d_head"]
    projection: nn.Module
    norm: Frozen | None
    factor: float

    def towards(self, direction: Float[Tensor, "row d_model"]) -> tuple[Tensor, Tensor]:
        """The part of every head's contribution along `direction` by the token it was read from, and the biases'.

        Returns:
            `(row, head, key)` and `(row,)`.
        """
        behind = direction.double() * self.factor
        before = behind if self.norm is None else self.norm.back(behind)
        n_heads = self.pattern.shape[1]
        nothing = torch.zeros(
            len(direction),
            1,
            n_heads * self.values.shape[-1],
            dtype=self.values.dtype,
            device=self.values.device,
            requires_grad=True,
        )
        with torch.enable_grad():
            constant = self.projection(nothing)
            (at_z,) = torch.autograd.grad(constant, nothing, before.to(constant)[:, None])
        at_z = at_z[:, 0].unflatten(-1, (n_heads, -1)).float()
        values = self.values.float().repeat_interleave(n_heads // self.values.shape[2], 2)
        by_source = torch.einsum("rhk,rkhd,rhd->rhk", self.pattern.to(values.device), values, at_z)
        bias = (before * constant[:, 0].detach().to(before)).sum(-1)
        if self.norm is not None:
            bias = bias + (behind * self.norm.bias).sum(-1)
        return by_source, bias


@dataclass(frozen=True)
class Added:
    """What was added for a batch of prompts at their prediction positions; `index` are their numbers.

    `last` is what the last layer gives: `embed` and the sum of `attn` and `mlp` over layers.
    """

    index: list[int]
    embed: Float[Tensor, "row d_model"]
    attn: Float[Tensor, "layer row d_model"]
    mlp: Float[Tensor, "layer row d_model"]
    last: Float[Tensor, "row d_model"]
    heads: list[Heads] = field(repr=False)


def contributions(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Added]:
    """Contributions to the residual stream at the prediction position, batch by batch.

    Args:
        model: a causal language model in eval mode; a live adapter is in its numbers.
        prompts: whom to ask; answers are not run.
        batch_tokens: most tokens in a batch, padding included.

    Raises:
        UnsupportedModel: the residual stream is not the sum of what attention and MLP add, or what attention adds is
            not that of its heads.
    """
    check_model(model)
    projections = output_projections(model)
    for index in batches([prompt.prediction + 1 for prompt in prompts], batch_tokens):
        yield _batch(model, projections, [prompts[i] for i in index], index)


@dataclass
class _Seen:
    """What passed through a layer at the prediction positions."""

    streams: list[Tensor] = field(default_factory=list)
    parts: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, tuple[nn.Module, Tensor, Tensor]] = field(default_factory=dict)
    values: Tensor | None = None


@torch.no_grad()
def _batch(model: PreTrainedModel, projections: list[nn.Module], prompts: list[Prompt], index: list[int]) -> Added:
    layers, none = decoder_layers(model), torch.zeros(0, dtype=torch.long)
    at = torch.tensor([prompt.prediction for prompt in prompts])
    ids = padded_ids(prompts, model.device)[:, : int(at.max()) + 1]
    rows = torch.arange(len(prompts))
    seen = [_Seen() for _ in layers]

    def here(state: Tensor) -> Tensor:
        return state[rows.to(state.device), at.to(state.device)].clone()

    def inside(component: Component, layer: int, state: Tensor) -> None:
        if component == "v":
            seen[layer].values = state.clone()

    tap = Tap(change=inside, keep_queries=at[:, None].to(model.device))
    with ExitStack() as stack:
        for layer, its in zip(layers, seen, strict=True):
            _watch(stack, layer, its, here)
        stack.enter_context(only_positions(model, none, none))
        stack.enter_context(tapped(model, tap, range(len(layers))))
        model(input_ids=ids, use_cache=False)
    added: dict[str, list[Tensor]] = {"attn": [], "mlp": []}
    heads = []
    for number, its in enumerate(seen):
        norms = {name: Frozen.of(module, x, y) for name, (module, x, y) in its.norms.items()}
        factors = _factors(model, number, its)
        for name, factor in factors.items():
            added[name].append(its.parts[name].double() * factor)
        pattern = tap.weights[number][:, :, 0].to(its.parts["attn"].device)
        assert its.values is not None
        heads.append(Heads(pattern, its.values, projections[number], norms.get("attn"), factors["attn"]))
        _check_heads(model, number, its, heads[-1])
    attn, mlp = (torch.stack([one.to(model.device) for one in added[name]]) for name in ("attn", "mlp"))
    streams = [seen[0].streams[0].double().to(model.device), seen[-1].streams[1].double().to(model.device)]
    return Added(index, streams[0], attn, mlp, streams[1], heads)


def _watch(stack: ExitStack, layer: nn.Module, seen: _Seen, here: Any) -> None:
    """Keep what a layer is given and gives, and what its attention and MLP return, followed through norms behind them.

    A module behind another is one that is given the very tensor the other returned.
    """
    current: dict[str, Tensor] = {}

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.streams.append(here(args[0] if args else kwargs["hidden_states"]))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.streams.append(here(output[0] if isinstance(output, tuple) else output))

    def returned(name: str, _module: nn.Module, _args: Any, output: Any) -> None:
        current[name] = output[0] if isinstance(output, tuple) else output
        seen.parts[name] = here(current[name])

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        for name, state in current.items():
            if args and args[0] is state:
                if not isinstance(module, nn.Dropout):
                    if name in seen.norms:
                        raise UnsupportedModel(f"{type(layer).__name__} puts two modules behind its {name}")
                    seen.norms[name] = (module, here(state), here(output))
                current[name], seen.parts[name] = output, here(output)

    attention, mlp = attention_module(layer), mlp_module(layer)
    hooks = [layer.register_forward_pre_hook(before, with_kwargs=True), layer.register_forward_hook(after)]
    hooks += [
        module.register_forward_hook(partial(returned, name)) for name, module in (("attn", attention), ("mlp", mlp))
    ]
    hooks += [
        child.register_forward_hook(behind) for child in layer.children() if child is not attention and child is not mlp
    ]
    for hook in hooks:
        stack.callback(hook.remove)


def _factors(model: PreTrainedModel, number: int, seen: _Seen) -> dict[str, float]:
    """By what each part is multiplied before it is added: 1 in nearly all models, `residual_multiplier` in Granite."""
    dtype = seen.streams[0].dtype
    given, gives = (stream.double().flatten() for stream in seen.streams)
    parts = {name: part.double().flatten() for name, part in seen.parts.items()}
    change = gives - given
    solved = torch.linalg.lstsq(torch.stack(list(parts.values()), 1).cpu(), change.cpu()[:, None]).solution[:, 0]
    factors = {
        name: 1.0 if abs(factor - 1) < ONE else factor for name, factor in zip(parts, solved.tolist(), strict=True)
    }
    left = change - sum(factor * parts[name] for name, factor in factors.items())
    tolerance = LAYER_TOLERANCE[dtype] * float(max(change.norm(), given.norm() * torch.finfo(dtype).eps * 100))
    if not float(left.norm()) <= tolerance:
        raise UnsupportedModel(
            f"{type(model).__name__}: what layer {number} gives is not what it is given and what its attention and MLP "
            f"add ({float(left.norm() / change.norm()):.1e} of the change is left over), so there are no contributions"
        )
    return factors


def _check_heads(model: PreTrainedModel, number: int, seen: _Seen, heads: Heads) -> None:
    """Refuse a layer whose attention output is not W_O of what its heads read."""
    along = seen.parts["attn"].double()
    by_source, bias = heads.towards(along)
    whole = heads.factor * (along * along).sum(-1)
    apart = float((by_source.double().sum((1, 2)) + bias - whole).abs().max() / whole.abs().max())
    if not apart <= 10 * LAYER_TOLERANCE[seen.parts["attn"].dtype]:
        raise UnsupportedModel(
            f"{type(model).__name__}: what attention of layer {number} adds is not the sum of what its heads read "
            f"({apart:.1e} of it is left over)"
        )


@dataclass(frozen=True)
class Reading:
    """How logits read the last residual state at a fixed final norm: `direction` · state + `offset`."""

    direction: Float[Tensor, "row d_model"]
    offset: Float[Tensor, " row"]
    capped: bool
    """The model caps its logits behind the unembedding, and these are those before it."""


@torch.no_grad()
def reading(model: PreTrainedModel, last: Float[Tensor, "row d_model"], weights: Float[Tensor, "row vocab"]) -> Reading:
    """How weighted sums of logits read what the last layer gives.

    Raises:
        UnsupportedModel: what stands between the last layer and the unembedding is not one norm.
    """
    head, layers = model.get_output_embeddings(), decoder_layers(model)
    hidden = last.to(model.dtype)[:, None]
    norms: list[tuple[nn.Module, Tensor, Tensor]] = []
    given: list[Tensor] = []
    inside = {id(module) for layer in layers for module in layer.modules()}

    def behind(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if args and args[0] is hidden and module is not head:
            norms.append((module, args[0][:, 0], output[:, 0]))

    ids = torch.zeros(len(last), 1, dtype=torch.long, device=model.device)
    with ExitStack() as stack:
        for module in model.modules():
            if id(module) not in inside and not list(module.children()):
                stack.callback(module.register_forward_hook(behind).remove)
        stack.enter_context(on_input(head, given.append))
        stack.enter_context(layers_giving(layers, hidden))
        logits = model(input_ids=ids, use_cache=False).logits[:, 0].double()
    frozen = Frozen.of(*norms[0]) if norms else None
    if len(norms) > 1 or not torch.equal(given[0][:, 0], norms[0][2] if norms else hidden[:, 0]):
        raise UnsupportedModel(f"{type(model).__name__} puts more than one norm between its last layer and its logits")
    with torch.enable_grad():
        state = given[0].detach().requires_grad_()
        raw = head(state)
        (at_head,) = torch.autograd.grad(raw, state, weights.to(raw)[:, None])
    raw = raw[:, 0].detach().double()
    # Logits may be divided by a number behind the unembedding, as in Granite, or capped, as in Gemma 2.
    factor = float((logits * raw).sum() / (raw * raw).sum())
    capped = float((logits - factor * raw).norm()) > LAYER_TOLERANCE[model.dtype] * float(logits.norm())
    factor = 1.0 if capped or abs(factor - 1) < LAYER_TOLERANCE[model.dtype] else factor
    direction = factor * at_head[:, 0].double()
    nothing = head(torch.zeros_like(given[0]))[:, 0].double()
    offset = factor * (nothing * weights.to(nothing)).sum(-1)
    if frozen is not None:
        offset, direction = offset + direction @ frozen.bias, frozen.back(direction)
    return Reading(direction, offset, capped)
