"""What `verify` holds against the engine: one whole pass with plain hooks and the model's own eager attention.

Nothing here goes by the engine's interventions: states are read, replaced and scaled where the model's modules and its
attention function give them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from subjattn.engine.anatomy import attention_module, decoder_layers, mlp_module, mlp_modules
from subjattn.engine.interventions import Component, wide
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


_INTERFACE = "subjattn_verify"
States = dict[tuple[Component, int], Tensor]
Put = tuple[Component, int, Sequence[int], Tensor]
"""A component (what a module takes or returns), its layer, positions, and what stands there instead."""


@dataclass
class _Pass:
    """One pass that runs: what is read of it, and by layer what its attention is given."""

    read: States = field(default_factory=dict)
    added: Mapping[int, Tensor] = field(default_factory=dict)
    queries: Mapping[int, Tensor] = field(default_factory=dict)


_now = _Pass()


def _attend(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **how: Any) -> tuple[Tensor, Any]:
    """The model's own eager attention, and what goes into it and comes out kept; its mask is added to the scores."""
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if eager is None:
        raise UnsupportedModel(f"{type(module).__name__} has no eager attention of its own to be run by plain hooks")
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    query = _now.queries.get(layer, query)
    if layer in _now.added:
        mask = mask + _now.added[layer].to(mask)
    found, pattern = eager(module, query, key, value, mask, **how)
    if layer in _now.queries:  # in float16 small weights are 0, whose logarithm is asked for
        pattern = eager(module, *map(wide, (query, key, value, mask)), **how)[1]
    inside: dict[Component, Tensor] = {"q": query, "k": key, "v": value, "pattern": pattern, "z": found.transpose(1, 2)}
    _now.read.update({(name, layer): state[0].clone() for name, state in inside.items()})
    return found, pattern


AttentionInterface.register(_INTERFACE, _attend)
AttentionMaskInterface.register(_INTERFACE, eager_mask)


@torch.inference_mode()
def run(
    model: PreTrainedModel,
    prompt: Prompt,
    *,
    noise: tuple[Sequence[int], Tensor] | None = None,
    put: Sequence[Put] = (),
    added: Mapping[int, Tensor] | None = None,
    queries: Mapping[int, Tensor] | None = None,
) -> tuple[Tensor, States]:
    """Logits `[position, vocab]` of one pass, and every component of every layer.

    States are `[position, width]` or `[head, position, width]`, as modules and attention gave them.

    Args:
        model: in eval mode.
        prompt: with its answer.
        noise: positions, and what is added there to what the input embedding gives.
        put: states of `resid_pre`, `resid_post`, `attn_out` or `mlp_out` replaced.
        added: by layer, what is added to attention scores, `[head or 1, query, key]`.
        queries: by layer, what attention takes for its queries, `[1, head, position, width]`; its pattern is then kept
            in at least float32.
    """
    global _now
    _now = _Pass(added={at: of[None] for at, of in (added or {}).items()}, queries=queries or {})
    with _attending(model), ExitStack() as stack:
        if noise is not None:
            at, values = list(noise[0]), noise[1]
            hook = lambda _, __, state: _with(state, at, (state[0, at] + values.to(state.device)).to(state))  # noqa: E731
            stack.callback(model.get_input_embeddings().register_forward_hook(hook).remove)
        for layer, module in enumerate(decoder_layers(model)):
            own = {name: (list(at), of) for name, where, at, of in put if where == layer}
            named: list[tuple[Component, nn.Module]] = [("resid_post", module), ("attn_out", attention_module(module))]
            if "mlp_out" in own or len(mlp_modules(module)) == 1:
                named.append(("mlp_out", mlp_module(module)))
            for name, part in named:
                stack.callback(part.register_forward_hook(_behind(name, layer, own.get(name))).remove)
            before = _before(layer, own.get("resid_pre"))
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
        logits = model(input_ids=torch.tensor([prompt.ids], device=model.device), use_cache=False).logits[0]
    return logits, dict(_now.read)


def _with(state: Tensor, at: list[int], values: Tensor) -> Tensor:
    changed = state.clone()
    changed[0, at] = values.to(changed)
    return changed


def _behind(name: Component, layer: int, put: tuple[list[int], Tensor] | None) -> Callable[..., Any]:
    def hook(_: nn.Module, __: Any, output: Any) -> Any:
        state = output[0] if isinstance(output, tuple) else output
        changed = state if put is None else _with(state, *put)
        _now.read[name, layer] = changed[0].clone()
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    return hook


def _before(layer: int, put: tuple[list[int], Tensor] | None) -> Callable[..., Any]:
    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        state = args[0] if args else kwargs["hidden_states"]
        changed = state if put is None else _with(state, *put)
        _now.read["resid_pre", layer] = changed[0].clone()
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    return hook


@contextmanager
def _attending(model: PreTrainedModel) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation(_INTERFACE)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
