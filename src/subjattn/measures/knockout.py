"""Attention knock-out: what the answer loses when edges to the subject are blocked.

Edges are blocked before the softmax, so the remaining weights renormalise (Geva et al. 2023). Two
routes tell how the subject reaches the answer:

* `direct`: from every position that predicts an answer token to the subject;
* `total`: from every position after the subject to it, answer tokens included: what the subject is
  worth by any route, relays through the words in between among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import xarray as xr

from subjattn.engine.forward import decoder_layers
from subjattn.engine.interventions import Block, Row
from subjattn.measures import check_askable, hf_model, labelled
from subjattn.measures.answers import row_logprobs
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

Route = Literal["direct", "total"]
ROUTES: tuple[Route, ...] = ("direct", "total")
_QUERIES = {"direct": "every answer-predicting position", "total": "every position after the subject"}


def knockout(
    model: Model, prompts: Sequence[Prompt], routes: Sequence[Route] = ROUTES, *, by_layer: bool = False
) -> xr.DataArray:
    """Fall in the answer's summed log-probability when edges to the subject are blocked, in nats.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        routes: which edges, see the module's text.
        by_layer: block one layer at a time instead of all together.

    Returns:
        `(fact, route)`, or `(fact, route, layer)` by layer. Positive: the answer got less likely. The
        coordinate `answer_logprob` `(fact,)` is the answer's log-probability with nothing blocked.

    Raises:
        BadInput: a prompt ends with its subject.
        UnsupportedModel, NotFired: the edges could not be blocked.
    """
    check_askable(prompts)
    n_layers = len(decoder_layers(hf_model(model)))
    layers: list[tuple[int, ...] | None] = [(layer,) for layer in range(n_layers)] if by_layer else [None]
    rows = [Row(prompt) for prompt in prompts]
    for prompt in prompts:
        keys = tuple(prompt.subject_positions)
        rows += [Row(prompt, block=Block(_queries(prompt, r), keys, layer)) for r in routes for layer in layers]
    baseline, blocked = np.split(row_logprobs(model, rows), [len(prompts)])
    drop = baseline[:, None, None] - blocked.reshape(len(prompts), len(routes), len(layers))
    array = labelled(
        "knockout_drop",
        drop if by_layer else drop[..., 0],
        prompts,
        ("route", "layer") if by_layer else ("route",),
        unit="nats",
        definition=_definition(
            " or ".join(f"{_QUERIES[r]} ({r})" for r in routes), "one layer" if by_layer else "all layers"
        ),
        paper="Geva et al. 2023 (there: windows of 9 layers, change of the top prediction's probability)",
    )
    return array.assign_coords(route=list(routes), answer_logprob=("fact", baseline))


def one_route(drop: xr.DataArray, route: Route) -> xr.DataArray:
    """One route of `knockout` in all layers, `(fact,)`, with its own definition."""
    array = drop.sel(route=route, drop=True).drop_vars("answer_logprob")
    return array.assign_attrs(definition=_definition(_QUERIES[route], "all layers"))


def _definition(queries: str, layers: str) -> str:
    return (
        f"fall in the answer's summed log-probability when the edges from {queries} to the subject are blocked "
        f"before the softmax in {layers}"
    )


def _queries(prompt: Prompt, route: Route) -> tuple[int, ...]:
    if route == "direct":
        return tuple(prompt.predicting)
    return tuple(range(prompt.subject_span[1], len(prompt)))
