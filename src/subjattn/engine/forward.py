"""Forward passes of a Hugging Face model under interventions: one batch row per prompt and intervention.

The model's own modules compute everything; hooks replace residual streams, the attention function
(attention.py) blocks edges and keeps rows, and only the positions that predict an answer meet the
unembedding. Rows of different length share a batch padded on the right without a padding mask: in a
causal model no position sees what follows it, so a prompt's positions, and its numbers, are the same
in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.attention import Tap, tapped
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.prompts import Prompt


BATCH_TOKENS = 2048
"""Tokens of a batch, padding included: well under 1 GB of working memory for a model of 135 M."""


@dataclass(frozen=True)
class Block:
    """Attention edges from `queries` to `keys` blocked before the softmax, in `layers` (None: all)."""

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Patch:
    """The residual stream before `layer` replaced at `positions` by another run's values."""

    layer: int
    positions: tuple[int, ...]
    values: Float[Tensor, "position d_model"]


@dataclass(frozen=True, eq=False)
class Row:
    """One prompt under at most one intervention of each kind."""

    prompt: Prompt
    block: Block | None = None
    patch: Patch | None = None


@dataclass
class Output:
    """What one batch of rows gave; `index` says where its rows stand among those asked for."""

    index: list[int]
    rows: list[Row]
    logits: Float[Tensor, "row answer vocab"]
    tap: Tap


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever its architecture calls them."""
    n_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {n_layers} decoder layers")


def forward(
    model: PreTrainedModel, rows: Sequence[Row], *, keep_prediction_row: bool = False, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Output]:
    """Run every row, in batches of similar length, and yield each batch's answer logits.

    Args:
        model: a causal language model in eval mode.
        rows: prompts with their interventions.
        keep_prediction_row: keep the attention of the prediction position in `Output.tap.weights`.
        batch_tokens: most tokens in a batch, padding included.

    Yields:
        Outputs with logits `[row, answer, vocab]` in float32, where `answer` counts the positions that
        predict answer tokens, the longest answer of the batch deciding; shorter ones repeat their last.

    Raises:
        UnsupportedModel, NotFired: see errors.py.
    """
    check_causal(model)
    for index in _batches([len(row.prompt) for row in rows], batch_tokens):
        yield _forward_batch(model, index, [rows[i] for i in index], keep_prediction_row)


def residual_streams(
    model: PreTrainedModel, prompts: Sequence[Prompt], batch_tokens: int = BATCH_TOKENS
) -> list[Float[Tensor, "layer pos d_model"]]:
    """The residual stream before every layer, one tensor per prompt."""
    streams: list[Tensor] = [torch.empty(0)] * len(prompts)
    for index in _batches([len(prompt) for prompt in prompts], batch_tokens):
        kept: dict[int, Tensor] = {}

        def keep(layer: int, hidden: Tensor, kept: dict[int, Tensor] = kept) -> None:
            kept[layer] = hidden

        with ExitStack() as stack:
            for layer, module in enumerate(decoder_layers(model)):
                stack.enter_context(_on_input(module, lambda hidden, layer=layer, keep=keep: keep(layer, hidden)))
            _forward_batch(model, index, [Row(prompts[i]) for i in index], False)
        stacked = torch.stack([kept[layer] for layer in range(len(kept))], dim=1)
        for i, stream in zip(index, stacked, strict=True):
            streams[i] = stream[:, : len(prompts[i])].clone()
    return streams


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model in training mode or one whose later positions can reach earlier ones."""
    if model.training:
        raise UnsupportedModel("the model is in training mode, where dropout changes every number: call model.eval()")
    if model.config.is_encoder_decoder or not getattr(model.config, "is_causal", True):
        raise UnsupportedModel(f"{type(model).__name__} is not a causal decoder")


def _batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Indices grouped by similar length; a group's rows × longest length stay within the budget."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and lengths[i] * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.inference_mode()
def _forward_batch(model: PreTrainedModel, index: list[int], rows: list[Row], keep_prediction_row: bool) -> Output:
    layers = decoder_layers(model)
    head = model.get_output_embeddings()
    prompts = [row.prompt for row in rows]
    length = max(map(len, prompts))
    ids = torch.tensor([[*p.ids, *[p.ids[-1]] * (length - len(p))] for p in prompts], device=model.device)
    predicting = _predicting(prompts).to(model.device)
    tap = _blocks(rows, length, len(layers), model.device)
    if keep_prediction_row:
        tap.keep_queries = predicting[:, :1]

    def at_answers(hidden: Tensor) -> Tensor:
        return hidden[torch.arange(len(rows), device=hidden.device)[:, None], predicting.to(hidden.device)]

    with ExitStack() as stack:
        stack.enter_context(_on_input(head, at_answers))
        fired = [stack.enter_context(hook) for hook in _patches(layers, rows)]
        stack.enter_context(tapped(model, tap, len(layers)))
        logits = model(input_ids=ids, use_cache=False).logits.float()
    if not all(fired):
        raise NotFired("a residual patch was never applied")
    return Output(index, rows, logits, tap)


def _predicting(prompts: list[Prompt]) -> Int[Tensor, "row answer"]:
    longest = max(len(prompt.predicting) for prompt in prompts)
    return torch.tensor([[min(p.prediction + j, p.predicting[-1]) for j in range(longest)] for p in prompts])


def _blocks(rows: list[Row], length: int, n_layers: int, device: torch.device) -> Tap:
    if all(row.block is None for row in rows):
        return Tap()
    blocked = torch.zeros(len(rows), length, length, dtype=torch.bool)
    active = torch.zeros(len(rows), n_layers, dtype=torch.bool)
    for i, row in enumerate(rows):
        if row.block is not None:
            blocked[i][torch.tensor(row.block.queries)[:, None], torch.tensor(row.block.keys)] = True
            active[i, list(range(n_layers) if row.block.layers is None else row.block.layers)] = True
    return Tap(blocked=blocked.to(device), blocked_layers=active.to(device))


def _patches(layers: nn.ModuleList, rows: list[Row]) -> Iterator[Any]:
    """One hook per layer that some row patches; its context value turns true when it has fired."""
    for layer in sorted({row.patch.layer for row in rows if row.patch is not None}):
        patches = [(i, row.patch) for i, row in enumerate(rows) if row.patch is not None and row.patch.layer == layer]

        def replace(hidden: Tensor, patches: list[tuple[int, Patch]] = patches) -> Tensor:
            hidden = hidden.clone()
            for i, patch in patches:
                hidden[i, list(patch.positions)] = patch.values.to(hidden)
            return hidden

        yield _on_input(layers[layer], replace)


class _Fired:
    """False until its hook has run."""

    def __init__(self) -> None:
        self.done = False

    def __bool__(self) -> bool:
        return self.done


@contextmanager
def _on_input(module: nn.Module, change: Any) -> Iterator[_Fired]:
    """Pass a module's hidden states through `change` before it sees them (None: leave them)."""
    fired = _Fired()

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        fired.done = True
        hidden = args[0] if args else kwargs["hidden_states"]
        changed = change(hidden)
        if changed is None:
            return args, kwargs
        return ((changed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": changed})

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield fired
    finally:
        handle.remove()
