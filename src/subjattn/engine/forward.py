"""Whole forward passes of a Hugging Face model, one batch row per prompt and intervention.

The model's own modules compute everything; hooks replace states, the attention function
(attention.py) blocks edges and keeps rows, and only the positions that predict an answer meet the
unembedding. Rows of different length share a batch padded on the right without a padding mask: in a
causal model no position sees what follows it, so a prompt's positions, and its numbers, are the same
in any batch.

This is the plain way. cones.py gives the same logits for less where rows carry interventions, and is
tested against it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.anatomy import (
    decoder_layers,
    n_heads,
    n_kv_heads,
    on_component,
    only_positions,
    output_gram,
    output_projections,
    padded_ids,
)
from subjattn.engine.arms import check_arms, routed
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import (
    BATCH_TOKENS,
    BY_HEAD,
    Component,
    Edges,
    Output,
    Patch,
    Row,
    Run,
    batches,
    check_rows,
    controls,
    edge_mask,
    fitted,
    wide,
)
from subjattn.engine.noise import noised
from subjattn.errors import NotFired
from subjattn.prompts import Prompt


def forward(model: PreTrainedModel, rows: Sequence[Row], *, batch_tokens: int = BATCH_TOKENS) -> Iterator[Output]:
    """Run every row, in batches of similar length, and yield each batch's answer logits.

    Args:
        model: a causal language model in eval mode.
        rows: prompts with their interventions.
        batch_tokens: most tokens in a batch, padding included.

    Raises:
        UnsupportedModel, NotFired: see errors.py.
    """
    check_model(model)
    check_rows(rows, len(decoder_layers(model)), n_heads(model), n_kv_heads(model))
    check_arms(model, rows)
    for plain in (True, False):
        members = [i for i, row in enumerate(rows) if row.plain == plain]
        for batch in batches([len(rows[i].prompt) for i in members], batch_tokens):
            index = [members[i] for i in batch]
            own = [rows[i] for i in index]
            beside, of = ([], []) if plain else controls(own)
            logits = _run([*own, *beside], model)
            split = sum(len(row.prompt.predicting) for row in own)
            control = None if plain else Output([], beside, logits[split:])
            yield Output(index, own, logits[:split], control, of)


@torch.inference_mode()
def attention_rows(
    model: PreTrainedModel, prompts: Sequence[Prompt], *, value_norms: bool = False, batch_tokens: int = BATCH_TOKENS
) -> Iterator[Output]:
    """Attention from the prediction position, `[row, head, 1, key]` by layer, without logits.

    Args:
        model: a causal language model in eval mode.
        prompts: whom to ask; answers are not run.
        value_norms: also ‖value·W_O‖ of every head and key, `[row, head, key]` by layer.
        batch_tokens: most tokens in a batch, padding included.
    """
    check_model(model)
    layers, heads = decoder_layers(model), n_heads(model)
    projections = output_projections(model) if value_norms else []
    grams: dict[int, Tensor] = {}
    for index in batches([prompt.prediction + 1 for prompt in prompts], batch_tokens):
        some = [prompts[i] for i in index]
        ids = padded_ids(some, model.device)[:, : max(prompt.prediction for prompt in some) + 1]
        last = torch.tensor([prompt.prediction for prompt in some], device=model.device)
        norms: dict[int, Tensor] = {}

        def keep(
            layer: int, _key: Tensor, value: Tensor, _mask: Tensor | None, norms: dict[int, Tensor] = norms
        ) -> None:
            if value_norms:
                if layer not in grams:
                    grams[layer] = output_gram(projections[layer], heads, value.shape[-1], value)
                norms[layer] = _value_norms(value, grams[layer])

        tap = Tap(keep_queries=last[:, None], keep=keep)
        none = torch.zeros(0, dtype=torch.long)
        with only_positions(model, none, none), tapped(model, tap, range(len(layers))):
            model(input_ids=ids, use_cache=False)
        yield Output(index, [Row(prompt) for prompt in some], torch.empty(0), attention=tap.weights, value_norms=norms)


def _value_norms(
    value: Float[Tensor, "row kv_head key d_head"], gram: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "row head key"]:
    values = value.float()[:, :, None]
    by_group = gram.unflatten(0, (value.shape[1], -1))
    return ((values @ by_group) * values).sum(-1).clamp_min(0).sqrt().flatten(1, 2)  # type: ignore[no-any-return]


@torch.inference_mode()
def states(
    model: PreTrainedModel, asked: Sequence[Run | Prompt], component: Component
) -> list[Float[Tensor, "layer pos ..."]]:
    """A component's output in every layer, one tensor per run; a prompt stands for its run of the model itself.

    Those by head are `[layer, pos, head, d_head]`; `pattern` is `[layer, query, head, key]`, whole.
    """
    runs = [one if isinstance(one, Run) else Run(one) for one in asked]
    found: list[Tensor] = [torch.empty(0)] * len(runs)
    layers = decoder_layers(model)
    for index in batches([len(run.prompt) for run in runs], BATCH_TOKENS):
        kept: dict[int, Tensor] = {}

        def keep(its: Component, layer: int, state: Tensor, kept: dict[int, Tensor] = kept) -> None:
            if its == component:
                kept[layer] = state

        tap = Tap(change=keep, patterns=range(len(layers)) if component == "pattern" else ())
        with ExitStack() as stack:
            none, some = torch.zeros(0, dtype=torch.long), [runs[i] for i in index]
            ids = padded_ids([run.prompt for run in some], model.device)
            routes = stack.enter_context(routed(model, [run.arm for run in some]))
            routes.choose(routes.of_runs(some, ids.shape[1]), none[None])
            if component not in BY_HEAD:
                for layer, module in enumerate(layers):
                    stack.enter_context(on_component(component, module, partial(kept.__setitem__, layer)))
            stack.enter_context(only_positions(model, none, none))
            stack.enter_context(tapped(model, tap, range(len(layers))))
            stack.enter_context(noised(model, some))
            model(input_ids=ids, use_cache=False)
        stacked = torch.stack([kept[layer] for layer in range(len(layers))], dim=1)
        for i, state in zip(index, stacked, strict=True):
            length = len(runs[i].prompt)
            state = state[:, :length]
            found[i] = (state[..., :length] if component == "pattern" else state).clone()
    return found


def predicting_positions(rows: Sequence[Row]) -> tuple[Int[Tensor, " prediction"], Int[Tensor, " prediction"]]:
    """Batch row and position of everything that predicts an answer token, row after row."""
    pairs = [(i, position) for i, row in enumerate(rows) for position in row.prompt.predicting]
    row, position = torch.tensor(pairs).T
    return row, position


@torch.inference_mode()
def _run(rows: list[Row], model: PreTrainedModel) -> Float[Tensor, "prediction vocab"]:
    layers, device = decoder_layers(model), model.device
    ids = padded_ids([row.prompt for row in rows], device)
    patches = _by_place(rows, model)
    fired: set[tuple[Component, int]] = set()

    def chosen(edges: Sequence[Edges | None], layer: int) -> Tensor | None:
        if not any(its is not None and its.acts_at(layer) for its in edges):
            return None
        mask = torch.zeros(len(rows), n_heads(model), ids.shape[1], ids.shape[1], dtype=torch.bool)
        for i, its in enumerate(edges):
            if its is not None and its.acts_at(layer):
                heads = its.heads_at(layer)
                mask[i, slice(None) if heads is None else list(heads)] = edge_mask(its, ids.shape[1])
        return mask.to(device)

    def added(layer: int) -> Tensor | None:
        mask = chosen([row.scale for row in rows], layer)
        add = torch.tensor([0.0 if row.scale is None else row.scale.add for row in rows], device=device)
        return None if mask is None else mask * add[:, None, None, None]

    def put(component: Component, layer: int, state: Tensor) -> Tensor | None:
        if (component, layer) not in patches:
            return None
        fired.add((component, layer))
        state = state.clone()
        for i, patch, values in patches[component, layer]:
            at = (i, list(patch.positions)) if patch.head is None else (i, list(patch.positions), patch.head)
            state[at] = fitted(component, values, state)
        return state

    with ExitStack() as stack:
        routes = stack.enter_context(routed(model, [row.arm for row in rows]))
        for component, layer in patches:
            if component not in BY_HEAD:
                stack.enter_context(on_component(component, layers[layer], partial(put, component, layer)))
        codes, predicting = routes.of_runs([row.run for row in rows], ids.shape[1]), predicting_positions(rows)
        routes.choose(codes, codes[predicting][None])
        stack.enter_context(only_positions(model, *predicting))
        patterns = {layer for component, layer in patches if component == "pattern"}
        tap = Tap(partial(chosen, [row.block for row in rows]), added, change=put, patterns=patterns)
        stack.enter_context(tapped(model, tap, range(len(layers))))
        stack.enter_context(noised(model, [row.run for row in rows]))
        logits = wide(model(input_ids=ids, use_cache=False).logits[0])
    if fired != set(patches):
        raise NotFired(f"patches of {sorted(set(patches) - fired)} were never applied")
    return logits


def _by_place(rows: list[Row], model: PreTrainedModel) -> dict[tuple[Component, int], list[tuple[int, Patch, Tensor]]]:
    """Patches with their values, by component and layer; values of other runs from whole passes of their own."""
    wanted = {
        (source, patch.component)
        for row in rows
        for patch in row.patches
        if (source := patch.source(row.arm)) is not None
    }
    taken: dict[tuple[Run, Component], Tensor] = {}
    for component in {component for _, component in wanted}:
        sources = [source for source, its in wanted if its == component]
        found = states(model, sources, component)
        taken |= zip([(source, component) for source in sources], found, strict=True)
    by_place: dict[tuple[Component, int], list[tuple[int, Patch, Tensor]]] = {}
    for i, row in enumerate(rows):
        for patch in row.patches:
            if (source := patch.source(row.arm)) is None:
                values = patch.values
            else:
                values = taken[source, patch.component][patch.layer, list(patch.taken_at)]
                values = values if patch.head is None else values[:, patch.head]
            by_place.setdefault((patch.component, patch.layer), []).append((i, patch, values))  # type: ignore[arg-type]
    return by_place
