"""Where the parts of a decoder are, found by what they do instead of by an architecture's names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.attention import Tap, tapped
from subjattn.engine.interventions import Component
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


_kv_heads: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model."""
    n_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {n_layers} decoder layers")


def layer_device(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weights are."""
    return next(layer.parameters()).device


def n_heads(model: PreTrainedModel) -> int:
    """Query heads of a layer."""
    return int(model.config.get_text_config().num_attention_heads)


@torch.inference_mode()
def n_kv_heads(model: PreTrainedModel) -> tuple[int, ...]:
    """Key/value heads of every layer, as its attention function gets them; found once a model."""
    if model not in _kv_heads:
        layers, found = range(len(decoder_layers(model))), dict[int, int]()
        tap = Tap(keep=lambda layer, key, _value, _mask: found.__setitem__(layer, key.shape[1]))
        with tapped(model, tap, layers):
            model(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False)
        _kv_heads[model] = tuple(found[layer] for layer in layers)
    return _kv_heads[model]


def attention_module(layer: nn.Module) -> nn.Module:
    """The child of a decoder layer that dispatches to the attention interface."""
    found = [child for child in layer.children() if hasattr(child, "layer_idx")]
    if len(found) != 1:
        raise UnsupportedModel(f"{type(layer).__name__} has {len(found)} attention modules instead of one")
    return found[0]


def mlp_modules(layer: nn.Module) -> list[nn.Module]:
    """Children of a decoder layer that have matrices and are not its attention: one, or the two matrices of an MLP."""
    attention = attention_module(layer)
    return [
        child
        for child in layer.children()
        if child is not attention and any(parameter.ndim > 1 for parameter in child.parameters())
    ]


def mlp_module(layer: nn.Module) -> nn.Module:
    """The MLP of a decoder layer, or its mixture of experts, where that is one module.

    Raises:
        UnsupportedModel: where it is none or several, as in OPT.
    """
    found = mlp_modules(layer)
    if len(found) != 1:
        raise UnsupportedModel(
            f"{type(layer).__name__} has {len(found)} modules that could be its MLP instead of one, so what its MLP "
            "adds cannot be measured or changed: measure attention or the residual stream"
        )
    return found[0]


@torch.inference_mode()
def output_projections(model: PreTrainedModel) -> list[nn.Module]:
    """W_O of every layer: the module that takes what the attention function returned."""
    found: dict[int, nn.Module] = {}
    waiting: list[int] = []

    def after_attention(component: Component, layer: int, _: Tensor) -> None:
        if component == "z":
            waiting.append(layer)

    def before_child(module: nn.Module, _: Any) -> None:
        if waiting:
            found[waiting.pop()] = module

    layers = decoder_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            for child in attention_module(layer).children():
                stack.callback(child.register_forward_pre_hook(before_child).remove)
        stack.enter_context(tapped(model, Tap(change=after_attention), range(len(layers))))
        model(input_ids=torch.tensor([[1, 2]], device=model.device), use_cache=False)
    modules = [found.get(layer) for layer in range(len(layers))]
    if any(module is None or all(p.ndim < 2 for p in module.parameters()) for module in modules):
        raise UnsupportedModel(f"{type(model).__name__} has no plain output projection behind its attention")
    return modules  # type: ignore[return-value]


@torch.inference_mode()
def output_gram(projection: nn.Module, n_heads: int, d_head: int, like: Tensor) -> Float[Tensor, "head d_head d_head"]:
    """W_O W_Oᵀ of every head, so that ‖v W_O‖² is v G vᵀ; a live adapter on W_O is in it."""
    width = n_heads * d_head
    eye = torch.eye(width, dtype=like.dtype, device=like.device)[None]
    matrix = (projection(eye) - projection(torch.zeros_like(eye[:, :1])))[0].to(like.device, torch.float32)
    matrix = matrix.view(n_heads, d_head, -1)
    return matrix @ matrix.transpose(1, 2)  # type: ignore[no-any-return]


def padded_ids(prompts: list[Prompt], device: torch.device) -> Int[Tensor, "row pos"]:
    """Token ids padded on the right by the last token, which no earlier position sees."""
    length = max(map(len, prompts))
    return torch.tensor([[*p.ids, *[p.ids[-1]] * (length - len(p))] for p in prompts], device=device)


@contextmanager
def only_positions(
    model: PreTrainedModel, rows: Int[Tensor, " prediction"], positions: Int[Tensor, " prediction"]
) -> Iterator[None]:
    """Let only chosen positions meet the unembedding, `[1, prediction, vocab]`; what follows it stays the model's.

    Rows and positions are given on the host.
    """
    with on_input(
        model.get_output_embeddings(),
        lambda hidden: hidden[rows.to(hidden.device), positions.to(hidden.device)][None],
    ):
        yield


class Fired:
    """False until its hook has run."""

    def __init__(self) -> None:
        self.done = False

    def __bool__(self) -> bool:
        return self.done


@contextmanager
def on_input(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[Fired]:
    """Pass a module's hidden states through `change` before it sees them (None: leave them)."""
    fired = Fired()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fired.done = True
        changed = change(args[0] if args else kwargs["hidden_states"])
        if changed is None:
            return args, kwargs
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield fired
    finally:
        handle.remove()


@contextmanager
def on_output(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[Fired]:
    """Pass what a module returns, or the first part of it, through `change` (None: leave it)."""
    fired = Fired()

    def hook(_: nn.Module, _args: Any, output: Any) -> Any:
        fired.done = True
        changed = change(output[0] if isinstance(output, tuple) else output)
        if changed is None:
            return output
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield fired
    finally:
        handle.remove()


def on_component(
    component: Component, layer: nn.Module, change: Callable[[Tensor], Tensor | None]
) -> AbstractContextManager[Fired]:
    """Pass a component of one decoder layer through `change`; those by head are the attention function's affair."""
    if component == "resid_pre":
        return on_input(layer, change)
    if component == "resid_post":
        return on_output(layer, change)
    return on_output(attention_module(layer) if component == "attn_out" else mlp_module(layer), change)
