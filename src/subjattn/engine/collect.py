"""States at chosen positions, gathered while a pass runs, which ends with the last layer that is asked for.

Nothing but what is gathered outlives its layer, answers are not run, and no position meets the unembedding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from subjattn.engine.anatomy import decoder_layers, on_component, on_input, on_output, padded_ids
from subjattn.engine.arms import routed
from subjattn.engine.attention import Tap, tapped
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import BATCH_TOKENS, Component, Run, batches
from subjattn.errors import BadInput, NotFired, UnsupportedModel


Site = Literal["resid_pre", "resid_post", "attn_out", "mlp_out", "z"]
SITES: tuple[Site, ...] = get_args(Site)
Place = Sequence[int]
"""Positions whose states are averaged; of none the mean is NaN."""


class _Enough(Exception):
    """Ends a pass."""


@torch.inference_mode()
def collected(
    model: PreTrainedModel,
    runs: Sequence[Run],
    places: Sequence[Sequence[Place]],
    sites: Sequence[Site],
    layers: Sequence[int],
    *,
    batch_tokens: int = BATCH_TOKENS,
) -> Iterator[tuple[list[int], dict[Site, Float[Tensor, "row layer place ..."]]]]:
    """Run every prompt up to its prediction position, in batches of similar length, and yield what was gathered.

    Args:
        model: a causal language model in eval mode.
        runs: prompts, each under its arm.
        places: of every run as many, each one or several positions up to the prediction position.
        sites: whose states; those of `z` are `[…, head, d_head]`, others `[…, d_model]`.
        layers: in ascending order.
        batch_tokens: most tokens in a batch, padding included.

    Yields:
        Indices of a batch's runs, and their states by site, float32.

    Raises:
        BadInput: a state is not finite.
        UnsupportedModel, NotFired: states of a layer cannot be read.
    """
    check_model(model)
    for index in batches([run.prompt.prediction + 1 for run in runs], batch_tokens):
        some = [runs[i] for i in index]
        found = _pass(model, some, [places[i] for i in index], sites, layers)
        stacked = {site: _stacked(site, [found.get((site, layer)) for layer in layers], layers) for site in sites}
        for site, states in stacked.items():
            _check_finite(site, states, some, [places[i] for i in index])
        yield index, stacked


def _pass(
    model: PreTrainedModel,
    runs: Sequence[Run],
    places: Sequence[Sequence[Place]],
    sites: Sequence[Site],
    layers: Sequence[int],
) -> dict[tuple[Component, int], Tensor]:
    kept: dict[tuple[Component, int], Tensor] = {}
    modules, none = decoder_layers(model), torch.zeros(0, dtype=torch.long)
    ids = padded_ids([run.prompt for run in runs], model.device)[:, : max(run.prompt.prediction for run in runs) + 1]
    gather = partial(_means, *_flat(places))

    def keep(site: Component, layer: int, state: Tensor) -> None:
        if site in sites and layer in layers:
            kept[site, layer] = gather(state)

    def end(_: Tensor) -> None:
        raise _Enough

    try:
        with ExitStack() as stack:
            routes = stack.enter_context(routed(model, [run.arm for run in runs]))
            routes.choose(routes.of_runs(runs, ids.shape[1]), none[None])
            for site in set(sites) - {"z"}:
                for layer in layers:
                    stack.enter_context(on_component(site, modules[layer], partial(keep, site, layer)))
            stops = on_input if set(sites) == {"resid_pre"} else on_output
            stack.enter_context(stops(modules[layers[-1]], end))
            stack.enter_context(tapped(model, Tap(change=keep), None))
            model(input_ids=ids, use_cache=False)
    except _Enough:
        return kept
    raise NotFired(f"layer {layers[-1]} of {type(model).__name__} was not reached by its pass")


def _flat(places: Sequence[Sequence[Place]]) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Row and position of all that is gathered, the place it belongs to, and how many rows and places there are."""
    n_places = len(places[0])
    flat = [
        (row, position, row * n_places + place)
        for row, of_row in enumerate(places)
        for place, positions in enumerate(of_row)
        for position in positions
    ]
    row, position, cell = torch.tensor(flat, dtype=torch.long).view(-1, 3).T
    return row, position, cell, (len(places), n_places)


def _means(
    row: Tensor, position: Tensor, cell: Tensor, shape: tuple[int, int], state: Float[Tensor, "row pos ..."]
) -> Float[Tensor, "row place ..."]:
    device = state.device
    values, into = state[row.to(device), position.to(device)].float(), cell.to(device)
    sums = values.new_zeros(shape[0] * shape[1], *values.shape[1:]).index_add_(0, into, values)
    counts = torch.bincount(into, minlength=len(sums)).view(-1, *[1] * (values.ndim - 1))
    return (sums / counts).unflatten(0, shape).cpu()  # type: ignore[no-any-return]


def _stacked(site: Site, by_layer: Sequence[Tensor | None], layers: Sequence[int]) -> Tensor:
    if missing := [layer for layer, state in zip(layers, by_layer, strict=True) if state is None]:
        raise NotFired(f"{site} of layers {missing} was not reached as it should be")
    states = [state for state in by_layer if state is not None]
    if len({state.shape for state in states}) > 1:
        raise UnsupportedModel(f"{site} differs in width from layer to layer: ask for layers of one width")
    return torch.stack(states, 1)


def _check_finite(site: Site, states: Tensor, runs: Sequence[Run], places: Sequence[Sequence[Place]]) -> None:
    there = torch.tensor([[len(place) > 0 for place in of_row] for of_row in places])
    finite = torch.isfinite(states).flatten(3).all(-1).all(1)
    if bool((there & ~finite).any()):
        row = int((there & ~finite).nonzero()[0, 0])
        raise BadInput(
            f"fact {runs[row].prompt.fact_id}: {site} of the model is not finite: its weights are broken, or overflow "
            "in this precision; load it in bfloat16 or float32"
        )
