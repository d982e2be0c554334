"""Recompute only what an intervention can reach: its cone of layers and positions.

In a causal model an intervention at layer l and position p changes nothing below l and nothing before
p. Everything outside is the base run's: its residual streams, keys and values, computed once for all
rows of a prompt. All rows advance together, layer by layer: at layer l the rows whose cone starts
there join the batch, so a layer's weights are visited once for a whole grid.

The layers are the model's own modules, called with the arguments the model gave them in the base run,
cut to each row's positions. Exactness is checked when a model is first used (a cone that changes
nothing must give the base run's logits) and, in the tests, cell by cell against forward.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.attention import Tap, tapped
from subjattn.engine.forward import (
    check_causal,
    check_rows,
    decoder_layers,
    only_positions,
    padded_ids,
    predicting_positions,
)
from subjattn.engine.interventions import BATCH_TOKENS, Output, Patch, Row, batches, blocked_edges, blocks_at, wide
from subjattn.errors import UnsupportedModel
from subjattn.prompts import Prompt


_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far a cone that changes nothing may leave the base run, as a share of its largest logit."""
_checked: WeakSet[nn.Module] = WeakSet()


@dataclass
class _Base:
    """One run of some prompts, and all that cones need of it, by layer."""

    row_of: dict[Prompt, int]
    logits: Float[Tensor, "row answer vocab"]
    streams: list[Float[Tensor, "row pos d_model"]] = field(default_factory=list)
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=list)
    keys: list[Float[Tensor, "row kv_head pos d_head"]] = field(default_factory=list)
    values: list[Float[Tensor, "row kv_head pos d_head"]] = field(default_factory=list)
    masks: list[Tensor | None] = field(default_factory=list)


def forward(model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int = BATCH_TOKENS) -> Iterator[Output]:
    """The logits of `forward.forward`, for less: rows without an intervention are the base run's.

    Rows of one prompt should come in one call, so that they share its base run.

    Args:
        model: a causal language model in eval mode.
        rows: prompts with their interventions.
        batch_tokens: most tokens in a batch, of base runs and of cones.

    Raises:
        UnsupportedModel: the layers cannot be called by themselves, or would not give the same numbers.
        NotFired: see errors.py.
    """
    check_causal(model)
    check_rows(rows, len(decoder_layers(model)))
    prompts = list(dict.fromkeys(row.prompt for row in rows))
    for chosen in batches([len(prompt) for prompt in prompts], batch_tokens):
        base = _run_base(model, [prompts[i] for i in chosen])
        if model not in _checked:
            _check_exact(model, base)
            _checked.add(model)
        members = [i for i, row in enumerate(rows) if row.prompt in base.row_of]
        plain = [i for i in members if rows[i].block is None and rows[i].patch is None]
        if plain:
            own = [base.row_of[rows[i].prompt] for i in plain]
            yield Output(plain, [rows[i] for i in plain], base.logits[own])
        changed = [i for i in members if rows[i].block is not None or rows[i].patch is not None]
        for batch in batches([_suffix(rows[i]) for i in changed], batch_tokens):
            index = [changed[i] for i in batch]
            yield _run_cones(model, base, index, [rows[i] for i in index])


def _suffix(row: Row) -> int:
    """Positions of a row's cone, up to the last that predicts an answer token."""
    return row.prompt.predicting[-1] + 1 - row.first_position


@torch.inference_mode()
def _run_base(model: PreTrainedModel, prompts: list[Prompt]) -> _Base:
    base = _Base({prompt: i for i, prompt in enumerate(prompts)}, torch.empty(0))

    def keep(_layer: int, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
        base.keys.append(key)
        base.values.append(value)
        base.masks.append(mask)

    def keep_call(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, args, kwargs = _take_hidden(args, kwargs)
        base.streams.append(hidden)
        base.calls.append((args, kwargs))

    layers = decoder_layers(model)
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_pre_hook(keep_call, with_kwargs=True)
            stack.callback(handle.remove)
        stack.enter_context(only_positions(model, predicting_positions(prompts)))
        stack.enter_context(tapped(model, Tap(keep=keep), range(len(layers))))
        base.logits = wide(model(input_ids=padded_ids(prompts, model.device), use_cache=False).logits)
    return base


@torch.inference_mode()
def _run_cones(model: PreTrainedModel, base: _Base, index: list[int], rows: list[Row]) -> Output:
    """Rows of one base run, all layers; the batch grows as cones begin."""
    order = sorted(range(len(rows)), key=lambda i: rows[i].first_layer)
    index, rows = [index[i] for i in order], [rows[i] for i in order]
    layers, device = decoder_layers(model), model.device
    length = base.keys[0].shape[2]
    own = torch.tensor([base.row_of[row.prompt] for row in rows], device=device)
    positions = _positions(rows).to(device)
    edges = blocked_edges(rows, length)
    if edges is not None:
        edges = edges.to(device)[torch.arange(len(rows), device=device)[:, None], positions]
    begun = 0

    def blocked(layer: int) -> Tensor | None:
        return None if edges is None else edges[:begun] & blocks_at(rows[:begun], layer).to(device)[:, None, None]

    def join(layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        at = positions[:begun]
        whole = [
            kept[own[:begun]].scatter(2, at[:, None, :, None].expand_as(new), new)
            for kept, new in ((base.keys[layer], key), (base.values[layer], value))
        ]
        return whole[0], whole[1], _mask_rows(base.masks[layer], own[:begun], at, length)

    hidden: Tensor | None = None
    with tapped(model, Tap(blocked=blocked, join=join), range(rows[0].first_layer, len(layers))):
        for layer, module in enumerate(layers):
            joining = sum(row.first_layer == layer for row in rows)
            if joining:
                span = slice(begun, begun + joining)
                fresh = base.streams[layer][own[span][:, None], positions[span]]
                hidden = fresh if hidden is None else torch.cat([hidden, fresh])
                begun += joining
            if hidden is not None:
                for i, row in enumerate(rows[:begun]):
                    if row.patch is not None and row.patch.layer == layer:
                        _put(row.patch, hidden[i], positions[i])
                args, kwargs = _cut(base.calls[layer], own[:begun], positions[:begun], length)
                result = module(hidden, *args, **kwargs)
                hidden = result[0] if isinstance(result, tuple) else result
    assert hidden is not None
    answers = predicting_positions([row.prompt for row in rows]).to(device) - positions[:, :1]
    last = hidden[torch.arange(len(rows), device=device)[:, None], answers]
    return Output(index, rows, _unembed(model, last))


def _positions(rows: list[Row]) -> Int[Tensor, "row suffix"]:
    """Positions of each cone; shorter ones repeat their last, which then computes the same thing twice."""
    longest = max(map(_suffix, rows))
    return torch.tensor([[row.first_position + min(j, _suffix(row) - 1) for j in range(longest)] for row in rows])


def _put(patch: Patch, state: Float[Tensor, "suffix d_model"], positions: Int[Tensor, " suffix"]) -> None:
    """Write a patch into a row; a position that the padding repeats is written each time."""
    for position, value in zip(patch.positions, patch.values, strict=True):
        state[positions == position] = value.to(state)


def _mask_rows(
    mask: Tensor | None, own: Int[Tensor, " row"], positions: Int[Tensor, "row suffix"], length: int
) -> Tensor:
    """Rows of the model's own mask (None: plain causal) for each cone's queries: `[row, 1, suffix, key]`."""
    if mask is None:
        return (torch.arange(length, device=positions.device) <= positions[..., None])[:, None]
    if len(mask) == 1:
        own = torch.zeros_like(own)
    return mask.transpose(1, 2)[own[:, None], positions].transpose(1, 2)


def _take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], (), {name: value for name, value in kwargs.items() if name != "hidden_states"}


def _cut(
    call: tuple[tuple[Any, ...], dict[str, Any]], own: Int[Tensor, " row"], positions: Tensor, length: int
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's other arguments, cut to each row's positions. Masks are the attention function's affair."""

    def cut(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(cut(part) for part in value)
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if value.ndim == 4 and value.shape[-1] == value.shape[-2] == length:
            return None
        if value.ndim >= 2 and value.shape[1] == length:
            row = own if len(value) > 1 else torch.zeros_like(own)
            return value[row[:, None], positions]
        raise UnsupportedModel(f"a layer takes a tensor of shape {tuple(value.shape)} whose positions are unknown")

    args, kwargs = call
    return tuple(cut(value) for value in args), {name: cut(value) for name, value in kwargs.items()}


def _unembed(model: PreTrainedModel, hidden: Float[Tensor, "row answer d_model"]) -> Float[Tensor, "row answer vocab"]:
    """Final norm, unembedding and whatever the model does after its last layer, by the model's own forward."""
    with _layers_giving(decoder_layers(model), hidden):
        ids = torch.zeros(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return wide(model(input_ids=ids, use_cache=False).logits)


@contextmanager
def _layers_giving(layers: nn.ModuleList, hidden: Tensor) -> Iterator[None]:
    """Every layer does nothing and the last one gives `hidden`."""
    replaced = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = lambda *_args, **_kwargs: hidden
    try:
        yield
    finally:
        for layer, forward in zip(layers, replaced, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


def _check_exact(model: PreTrainedModel, base: _Base) -> None:
    """Cones that change nothing, from the first and a middle layer, must give the base run's logits."""
    prompt, row = next(iter(base.row_of.items()))
    n_layers = len(base.streams)
    rows = []
    for layer, position in ((0, 1), (n_layers // 2, max(1, prompt.prediction - 1))):
        at = tuple(range(position, prompt.prediction + 1))
        rows.append(Row(prompt, patch=Patch(layer, at, base.streams[layer][row, list(at)])))
    found = _run_cones(model, base, [0, 1], rows).logits
    n_answers = len(prompt.predicting)
    expected = base.logits[row, :n_answers]
    gap = float((found[:, :n_answers] - expected).abs().max() / expected.abs().max())
    if not gap <= _TOLERANCE.get(model.dtype, 5e-2):
        raise UnsupportedModel(
            f"{type(model).__name__}: recomputing part of a run moves its logits by {gap:.1e} of their size, so the "
            "engine would not be exact on it"
        )
