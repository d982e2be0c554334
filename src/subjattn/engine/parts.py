"""Which part of a model each of its modules is: what makes attention patterns, what they move, the MLP, or the rest.

Inside attention modules are told by what they reach: a column that moves queries or keys belongs to `qk`, one that
moves values to `vo`, and so does what comes behind the attention function. So fused projections are split by their
columns without their layout being known.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.anatomy import attention_module, decoder_layers, mlp_modules, n_heads
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.interventions import Part


@dataclass(frozen=True)
class Place:
    """What a module with weights is: its layer (-1: outside), and its parts with the output columns that are theirs.

    No columns stand for all of them; no parts, for a module whose parts cannot be told apart. `by_head` modules are
    given `[row, head, pos, d_head]`, all others positions as their second dimension.
    """

    layer: int
    columns: dict[Part, Bool[Tensor, " column"] | None]
    by_head: bool = False


def parts_of(model: PreTrainedModel) -> dict[nn.Module, Place]:
    """What every module that has weights of its own is.

    Where a column moves queries or keys, and values too, its module has no parts.
    """
    layers = decoder_layers(model)
    found = {module: Place(-1, {"rest": None}) for module in with_weights(model)}
    for layer, module in enumerate(layers):
        found |= {one: Place(layer, {"rest": None}) for one in with_weights(module)}
        found |= {one: Place(layer, {"mlp": None}) for mlp in mlp_modules(module) for one in with_weights(mlp)}
    return found | _in_attention(model)


def with_weights(module: nn.Module) -> Iterator[nn.Module]:
    """Modules that have parameters of their own."""
    for one in module.modules():
        if any(True for _ in one.parameters(recurse=False)):
            yield one


def _in_attention(model: PreTrainedModel) -> dict[nn.Module, Place]:
    """Modules of attention, by the gradients of queries, keys and values with respect to what they give."""
    layers = decoder_layers(model)
    of_layer = {one: i for i, layer in enumerate(layers) for one in with_weights(attention_module(layer))}
    length = n_heads(model) + 1  # of no other dimension
    added: dict[nn.Module, Tensor] = {}
    found: dict[nn.Module, Place] = {}

    def add_nothing(module: nn.Module, _args: Any, output: Tensor) -> Tensor:
        added[module] = torch.zeros_like(output, requires_grad=True)
        return output + added[module]

    def attend(layer: int, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
        own = [one for one in added if of_layer[one] == layer]
        for one, qk, v in zip(own, _moved((query, key), own, added), _moved((value,), own, added), strict=True):
            shape = added[one].shape
            found[one] = Place(layer, _columns(qk, v), by_head=len(shape) == 4 and shape[1] != length)
        return torch.zeros_like(query).transpose(1, 2)

    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.enable_grad())
        for module in of_layer:
            stack.callback(module.register_forward_hook(add_nothing).remove)
        stack.enter_context(tapped(model, Tap(attend=attend), range(len(layers))))
        model(input_ids=torch.ones(1, length, dtype=torch.long, device=model.device), use_cache=False)
    return found | {one: Place(layer, {"vo": None}) for one, layer in of_layer.items() if one not in found}


def _moved(
    states: tuple[Tensor, ...], modules: list[nn.Module], added: dict[nn.Module, Tensor]
) -> list[Bool[Tensor, " column"]]:
    """Of each module, the output columns that move these states."""
    total = sum(((one * torch.randn_like(one)).sum() for one in states), torch.zeros((), device=states[0].device))
    inputs = [added[one] for one in modules]
    grads = torch.autograd.grad(total, inputs, retain_graph=True, allow_unused=True)
    filled = [torch.zeros_like(one) if grad is None else grad for one, grad in zip(inputs, grads, strict=True)]
    return [(grad.flatten(0, -2) != 0).any(0).cpu() for grad in filled]


def _columns(qk: Bool[Tensor, " column"], v: Bool[Tensor, " column"]) -> dict[Part, Bool[Tensor, " column"] | None]:
    if (qk & v).any():
        return {}
    if not qk.any():
        return {"vo": None}
    return {"qk": None} if not v.any() else {"qk": qk, "vo": ~qk}
