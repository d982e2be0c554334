"""Slow, independent computations: one unpadded forward at a time, by the model's own eager attention.

Nothing here imports the engine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask

from subjattn.prompts import Prompt


@contextmanager
def eager(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


@torch.no_grad()
def logits(model: PreTrainedModel, prompt: Prompt, mask: Mask | None = None) -> Tensor:
    """All logits of one unpadded prompt, with an optional mask of one's own."""
    ids = torch.tensor([prompt.ids])
    extra = {} if mask is None else {"attention_mask": mask}
    with eager(model):
        return model(ids, use_cache=False, **extra).logits[0]


def answer_logprob(model: PreTrainedModel, prompt: Prompt, mask: Mask | None = None) -> float:
    """Summed log-probability of the answer."""
    logprobs = logits(model, prompt, mask).double().log_softmax(-1)
    return sum(float(logprobs[at, token]) for at, token in zip(prompt.predicting, prompt.answer_ids, strict=True))


Mask = Tensor | dict[str, Tensor]
Edits = dict[tuple[str, int], Callable[[Tensor], Tensor]]
"""By what (`q`, `k`, `v`, `scores`, `pattern`) and layer: a state `[1, head, …, …]` to what goes on in its place."""
_EDITS: Edits = {}


def _by_hand(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Attention step by step, each step open to an edit; scores are those behind scaling and soft-cap."""

    def edited(name: str, state: Tensor) -> Tensor:
        return _EDITS.get((name, module.layer_idx), lambda same: same)(state)

    query, key, value = edited("q", query), edited("k", key), edited("v", value)
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    pattern = edited("pattern", (edited("scores", scores) + attention_mask).softmax(-1))
    return (pattern @ value).transpose(1, 2), pattern


AttentionInterface.register("by_hand", _by_hand)
AttentionMaskInterface.register("by_hand", eager_mask)


@torch.no_grad()
def edited_logits(model: PreTrainedModel, prompt: Prompt, edits: Edits) -> Tensor:
    """All logits of one prompt, attending by hand with edits."""
    before = model.config._attn_implementation
    model.set_attn_implementation("by_hand")
    _EDITS.update(edits)
    try:
        return model(torch.tensor([prompt.ids]), use_cache=False).logits[0]
    finally:
        _EDITS.clear()
        model.set_attn_implementation(before)


def seen_inside(model: PreTrainedModel, prompt: Prompt, name: str, layer: int) -> Tensor:
    """What attention gets or gives there, `[head, …, …]`."""
    kept: list[Tensor] = []
    edited_logits(model, prompt, {(name, layer): lambda state: kept.append(state.clone()) or state})
    return kept[0][0]


def put_inside(values: Tensor, positions: tuple[int, ...], head: int) -> Callable[[Tensor], Tensor]:
    """An edit: rows of one head become others, `[position, …]`, whose keys may be fewer or more."""

    def put(state: Tensor) -> Tensor:
        state = state.clone()
        for row, position in zip(values, positions, strict=True):
            width = min(len(row), state.shape[-1])
            state[0, head, position] = 0
            state[0, head, position, :width] = row[:width]
        return state

    return put


def hand_mask(model: PreTrainedModel, length: int, edges: set[tuple[int, int]], heads: list[int] | None = None) -> Mask:
    """Additive `[1, head, T, T]` mask built by hand with edges taken out of some heads: causal, sliding, or both."""

    def build(window: int) -> Tensor:
        n_heads = model.config.num_attention_heads
        mask = torch.full((1, n_heads, length, length), torch.finfo(torch.float32).min)
        for head in range(n_heads):
            for query in range(length):
                for key in range(max(0, query - window + 1), query + 1):
                    if (query, key) not in edges or (heads is not None and head not in heads):
                        mask[0, head, query, key] = 0.0
        return mask

    kinds = set(getattr(model.config, "layer_types", None) or [])
    window = getattr(model.config, "sliding_window", None) or length
    if len(kinds) > 1:
        return {"full_attention": build(length), "sliding_attention": build(window)}
    return build(window)


@torch.no_grad()
def attention_weights(model: PreTrainedModel, prompt: Prompt) -> Tensor:
    """`[layer, head, key]` from the prediction position, through the model's own `output_attentions`."""
    ids = torch.tensor([prompt.ids[: prompt.prediction + 1]])
    with eager(model):
        attentions = model(ids, output_attentions=True, use_cache=False).attentions
    return torch.stack(attentions)[:, 0, :, -1]


@contextmanager
def replacing(model: PreTrainedModel, where: str, change: Callable[[Tensor], Tensor | None]) -> Iterator[None]:
    """Change what goes into (`path:in`) or comes out of a module, by a plain hook."""
    path, _, side = where.partition(":")
    module = model.get_submodule(path)

    def before(_: torch.nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        states = args[0] if args else kwargs["hidden_states"]
        changed = change(states)
        changed = states if changed is None else changed
        return ((changed, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": changed})

    def after(_: torch.nn.Module, _args: tuple, output: Tensor | tuple) -> Tensor | tuple:
        states = output[0] if isinstance(output, tuple) else output
        changed = change(states)
        changed = states if changed is None else changed
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = (
        module.register_forward_pre_hook(before, with_kwargs=True)
        if side == "in"
        else module.register_forward_hook(after)
    )
    try:
        yield
    finally:
        handle.remove()


def place(model: PreTrainedModel, component: str, layer: int, parts: tuple[str, str, str]) -> str:
    """Where a component is, given the names of a layer's attention, MLP and output projection."""
    layers = next(name for name, m in model.named_modules() if isinstance(m, torch.nn.ModuleList) and len(m) > 1)
    attention, mlp, projection = parts
    names = {
        "resid_pre": ":in",
        "resid_post": "",
        "attn_out": f".{attention}",
        "mlp_out": f".{mlp}",
        "z": f".{projection}:in",
    }
    return f"{layers}.{layer}{names[component]}"


@torch.no_grad()
def patched_logits(
    model: PreTrainedModel,
    source: Prompt,
    target: Prompt,
    where: str,
    positions: list[int],
    columns: slice = slice(None),
) -> Tensor:
    """All logits of `target` with a module's states (in some columns) taken from `source` at positions."""
    kept: list[Tensor] = []
    with replacing(model, where, lambda states: kept.append(states.clone())):
        model(torch.tensor([source.ids]), use_cache=False)

    def put(states: Tensor) -> Tensor:
        states = states.clone()
        for position in positions:
            states[:, position, columns] = kept[0][:, position, columns]
        return states

    with replacing(model, where, put):
        return model(torch.tensor([target.ids]), use_cache=False).logits[0]


def patched_logit_diff(
    model: PreTrainedModel, clean: Prompt, corrupt: Prompt, layer: int, positions: list[int]
) -> float:
    """Logit difference of the corrupt prompt with the clean residual before a layer at positions."""
    where = place(model, "resid_pre", layer, ("", "", ""))
    found = patched_logits(model, clean, corrupt, where, positions)[clean.prediction].double()
    return float(found[clean.answer_ids[0]] - found[corrupt.answer_ids[0]])


@torch.no_grad()
def hooked_logits(
    model: PreTrainedModel,
    target: Prompt,
    source: Prompt,
    patches: list[tuple[str, tuple[int, ...], Tensor | tuple[int, ...], slice]],
) -> Tensor:
    """All logits of `target` with several modules' states replaced: by tensors, or by `source`'s at other positions."""
    kept: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for where in {where for where, *_ in patches}:
            keep = lambda states, where=where: kept.__setitem__(where, states.clone())  # noqa: E731
            stack.enter_context(replacing(model, where, keep))
        model(torch.tensor([source.ids]), use_cache=False)

    def put(states: Tensor, where: str, positions: tuple[int, ...], values: Any, columns: slice) -> Tensor:
        states = states.clone()
        for i, position in enumerate(positions):
            given = values[i] if isinstance(values, Tensor) else kept[where][0, values[i], columns]
            states[0, position, columns] = given
        return states

    with ExitStack() as stack:
        for where, *rest in patches:
            change = lambda states, where=where, rest=rest: put(states, where, *rest)  # noqa: E731
            stack.enter_context(replacing(model, where, change))
        return model(torch.tensor([target.ids]), use_cache=False).logits[0]


@torch.no_grad()
def logits_by_layer_masks(
    model: PreTrainedModel, prompt: Prompt, blocked: dict[int, tuple[set[tuple[int, int]], list[int]]], attention: str
) -> Tensor:
    """All logits of one prompt, some layers attending by a hand-made mask of their own."""
    n, kinds = len(prompt), getattr(model.config, "layer_types", None) or []
    path = place(model, "attn_out", 0, (attention, "", "")).split(".0.")[0]

    def given(layer: int) -> Tensor:
        mask = hand_mask(model, n, *blocked[layer])
        return mask[kinds[layer]] if isinstance(mask, dict) else mask

    with ExitStack() as stack:
        for layer in blocked:
            hook = lambda _, args, kwargs, layer=layer: (args, kwargs | {"attention_mask": given(layer)})  # noqa: E731
            module = model.get_submodule(f"{path}.{layer}.{attention}")
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return logits(model, prompt)
