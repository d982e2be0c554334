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

import xarray as xr

from subjattn.engine.forward import Block, Row, decoder_layers
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled
from subjattn.measures.answers import answer_logprob, row_logprobs
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

Route = Literal["direct", "total"]
_QUERIES = {
    "direct": "every answer-predicting position",
    "total": "every position after the subject",
}


def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    route: Route = "direct",
    *,
    by_layer: bool = False,
    baseline: xr.DataArray | None = None,
) -> xr.DataArray:
    """Fall in the answer's summed log-probability when edges to the subject are blocked, in nats.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        route: which edges, see the module's text.
        by_layer: block one layer at a time (a pass per layer) instead of all together.
        baseline: `answer_logprob` of the same model and prompts, where it is at hand already.

    Returns:
        `(fact,)`, or `(fact, layer)` by layer. Positive: the answer got less likely.

    Raises:
        BadInput: a prompt ends with its subject, or the baseline is of other facts.
        UnsupportedModel, NotFired: the edges could not be blocked.
    """
    check_askable(prompts)
    layers = [(layer,) for layer in range(len(decoder_layers(hf_model(model))))] if by_layer else [None]
    if baseline is None:
        baseline = answer_logprob(model, prompts)
    if list(baseline["fact"].values) != [prompt.fact_id for prompt in prompts]:
        raise BadInput("the baseline was measured on other facts than the prompts ask")
    rows = [
        Row(p, block=Block(_queries(p, route), tuple(p.subject_positions), layer)) for p in prompts for layer in layers
    ]
    drop = baseline.values[:, None] - row_logprobs(model, rows).reshape(len(prompts), len(layers))
    return labelled(
        "knockout_drop" if route == "direct" else "knockout_drop_total",
        drop if by_layer else drop[:, 0],
        prompts,
        ("layer",) if by_layer else (),
        unit="nats",
        definition="fall in the answer's summed log-probability when the edges from "
        f"{_QUERIES[route]} to the subject are blocked before the softmax, in "
        + ("one layer" if by_layer else "all layers"),
        paper="Geva et al. 2023 (there: windows of 9 layers, change of the top prediction's probability)",
    )


def _queries(prompt: Prompt, route: Route) -> tuple[int, ...]:
    if route == "direct":
        return tuple(prompt.predicting)
    return tuple(range(prompt.subject_span[1], len(prompt)))
