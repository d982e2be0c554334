"""Whole forward passes of a Hugging Face model, one batch row per prompt and intervention.

The model's own modules compute everything; hooks replace residual streams, the attention function
(attention.py) blocks edges and keeps rows, and only the positions that predict an answer meet the
unembedding. Rows of different length share a batch padded on the right without a padding mask: in a
causal model no position sees what follows it, so a prompt's positions, and its numbers, are the same
in any batch.

This is the plain way. cones.py gives the same logits for less where rows carry interventions, and is
tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from subjattn.engine.attention import Tap, tapped
from subjattn.engine.interventions import BATCH_TOKENS, Output, Patch, Row, batches, blocked_edges, blocks_at, wide
from subjattn.errors import NotFired, UnsupportedModel
from subjattn.prompts import Prompt


_causal: WeakSet[nn.Module] = WeakSet()


def forward(
    model: PreTrainedModel, rows: Sequence[Row], *, keep_prediction_row: bool = False, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Output]:
    """Run every row, in batches of similar length, and yield each batch's answer logits.

    Args:
        model: a causal language model in eval mode.
        rows: prompts with their interventions.
        keep_prediction_row: keep the attention of the prediction position, `[row, head, 1, key]` by layer.
        batch_tokens: most tokens in a batch, padding included.

    Yields:
        Outputs with logits `[row, answer, vocab]` in float32, where `answer` counts the positions that
        predict answer tokens, the longest answer of the batch deciding; shorter ones repeat their last.

    Raises:
        UnsupportedModel, NotFired: see errors.py.
    """
    check_causal(model)
    check_rows(rows, len(decoder_layers(model)))
    for index in batches([len(row.prompt) for row in rows], batch_tokens):
        yield _forward_batch(model, index, [rows[i] for i in index], keep_prediction_row)


@torch.inference_mode()
def residual_streams(
    model: PreTrainedModel, prompts: Sequence[Prompt], batch_tokens: int = BATCH_TOKENS
) -> list[Float[Tensor, "layer pos d_model"]]:
    """The residual stream before every layer, one tensor per prompt."""
    check_causal(model)
    streams: list[Tensor] = [torch.empty(0)] * len(prompts)
    for index in batches([len(prompt) for prompt in prompts], batch_tokens):
        kept: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer, module in enumerate(decoder_layers(model)):
                stack.enter_context(on_input(module, partial(kept.__setitem__, layer)))
            model(input_ids=padded_ids([prompts[i] for i in index], model.device), use_cache=False, logits_to_keep=1)
        stacked = torch.stack([kept[layer] for layer in range(len(kept))], dim=1)
        for i, stream in zip(index, stacked, strict=True):
            streams[i] = stream[:, : len(prompts[i])].clone()
    return streams


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, whatever its architecture calls them."""
    n_layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr, operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return module
    raise UnsupportedModel(f"{type(model).__name__} has no list of {n_layers} decoder layers")


def check_causal(model: PreTrainedModel) -> None:
    """Refuse a model in training mode, or one whose later positions reach earlier ones (tried out once a model)."""
    if model.training:
        raise UnsupportedModel("the model is in training mode, where dropout changes every number: call model.eval()")
    if model in _causal:
        return
    config = model.config.get_text_config()
    ids = torch.arange(2, 10)[None].to(model.device) % config.vocab_size
    other = ids.clone()
    other[0, -1] = 1
    with torch.inference_mode():
        first, second = (model(input_ids=x, use_cache=False).logits[0, :-1] for x in (ids, other))
    if not first.isfinite().all():
        raise UnsupportedModel(f"{type(model).__name__} gives logits that are not finite in {model.dtype}: try float32")
    if model.config.is_encoder_decoder or float((first - second).abs().max()) > 1e-3 * float(first.abs().max()):
        raise UnsupportedModel(
            f"{type(model).__name__} is not a causal decoder: a later token changes what earlier positions predict"
        )
    _causal.add(model)


def check_rows(rows: Sequence[Row], n_layers: int) -> None:
    """Refuse an intervention that lies outside its prompt or model, where it would silently do nothing."""
    for row in rows:
        length, last = len(row.prompt), row.prompt.predicting[-1]
        block, patch = row.block, row.patch
        if block is not None:
            layers = range(n_layers) if block.layers is None else block.layers
            inside = [0 <= layer < n_layers for layer in layers]
            inside += [0 <= position < length for position in (*block.queries, *block.keys)]
            if not (all(inside) and layers and block.queries and block.keys):
                raise NotFired(f"fact {row.prompt.fact_id}: {block} is empty, or lies outside the prompt or model")
        if patch is not None and not (
            0 <= patch.layer < n_layers and patch.positions and all(0 <= p <= last for p in patch.positions)
        ):
            raise NotFired(
                f"fact {row.prompt.fact_id}: a patch of layer {patch.layer} at positions {patch.positions} "
                "lies outside the prompt or model"
            )


def padded_ids(prompts: Sequence[Prompt], device: torch.device) -> Int[Tensor, "row pos"]:
    """Token ids padded on the right by the last token, which no earlier position sees."""
    length = max(map(len, prompts))
    return torch.tensor([[*p.ids, *[p.ids[-1]] * (length - len(p))] for p in prompts], device=device)


def predicting_positions(prompts: Sequence[Prompt]) -> Int[Tensor, "row answer"]:
    """Positions that predict answer tokens; shorter answers repeat their last."""
    longest = max(len(prompt.predicting) for prompt in prompts)
    return torch.tensor([[min(p.prediction + j, p.predicting[-1]) for j in range(longest)] for p in prompts])


@torch.inference_mode()
def _forward_batch(model: PreTrainedModel, index: list[int], rows: list[Row], keep_prediction_row: bool) -> Output:
    layers = decoder_layers(model)
    ids = padded_ids([row.prompt for row in rows], model.device)
    predicting = predicting_positions([row.prompt for row in rows]).to(model.device)
    edges = blocked_edges(rows, ids.shape[1])
    tap = Tap(keep_queries=predicting[:, :1] if keep_prediction_row else None)
    if edges is not None:
        tap.blocked = lambda layer: (edges & blocks_at(rows, layer)[:, None, None]).to(model.device)
    with ExitStack() as stack:
        stack.enter_context(only_positions(model, predicting))
        fired = [stack.enter_context(hook) for hook in _patches(layers, rows)]
        stack.enter_context(tapped(model, tap, range(len(layers))))
        logits = wide(model(input_ids=ids, use_cache=False).logits)
    if not all(fired):
        raise NotFired("a residual patch was never applied")
    return Output(index, rows, logits, tap.weights)


def _patches(layers: nn.ModuleList, rows: list[Row]) -> Iterator[Any]:
    """One hook per layer that some row patches; its context value turns true when it has fired."""
    for layer in sorted({row.patch.layer for row in rows if row.patch is not None}):
        patches = [(i, row.patch) for i, row in enumerate(rows) if row.patch is not None and row.patch.layer == layer]

        def replace(hidden: Tensor, patches: list[tuple[int, Patch]] = patches) -> Tensor:
            hidden = hidden.clone()
            for i, patch in patches:
                hidden[i, list(patch.positions)] = patch.values.to(hidden)
            return hidden

        yield on_input(layers[layer], replace)


@contextmanager
def only_positions(model: PreTrainedModel, positions: Int[Tensor, "row answer"]) -> Iterator[None]:
    """Let only chosen positions meet the unembedding; what follows it (soft-caps, scales) stays the model's."""
    rows = torch.arange(len(positions))[:, None]
    with on_input(
        model.get_output_embeddings(), lambda hidden: hidden[rows.to(hidden.device), positions.to(hidden.device)]
    ):
        yield


class _Fired:
    """False until its hook has run."""

    def __init__(self) -> None:
        self.done = False

    def __bool__(self) -> bool:
        return self.done


@contextmanager
def on_input(module: nn.Module, change: Callable[[Tensor], Tensor | None]) -> Iterator[_Fired]:
    """Pass a module's hidden states through `change` before it sees them (None: leave them)."""
    fired = _Fired()

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
