"""Attention knock-out: what the answer loses when edges are blocked.

Edges are blocked before the softmax, so the remaining weights renormalise (Geva et al. 2023). A route
is a set of edges; those of the subject tell how it reaches the answer:

* `direct`: from every position that predicts an answer token to the subject;
* `total`: from every position after the subject to it, answer tokens included: what the subject is
  worth by any route, relays through the words in between among them;
* `non_subject`: from every predicting position to all but the subject and itself;
* `last`: from every predicting position to itself;
* `subject_to_earlier`: from the subject to everything before it.

Where one position follows the subject and the answer is one token ("The capital of Kenya is"), `direct` and `total`
are the same edges: that the subject is read directly is then no finding. The coordinate `routes_coincide` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, get_args, overload

import numpy as np
import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.interventions import Block, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, shortened
from subjattn.measures.metrics import CHANGES, MEANINGS, UNITS, Measured, Metric, measure_rows, parse_metrics
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

Route = Literal["direct", "total", "non_subject", "last", "subject_to_earlier"]
By = Literal["layer", "window", "head"]
Edges = Callable[[Prompt], Iterable[tuple[int, int]]]
ROUTES: tuple[Route, ...] = get_args(Route)
_EDGES: dict[str, tuple[str, Edges]] = {
    "direct": (
        "from every answer-predicting position to the subject",
        lambda p: [(query, key) for query in p.predicting for key in p.subject_positions],
    ),
    "total": (
        "from every position after the subject to the subject",
        lambda p: [(query, key) for query in range(p.subject_span[1], len(p) - 1) for key in p.subject_positions],
    ),
    "non_subject": (
        "from every answer-predicting position to all but the subject and itself",
        lambda p: [(query, key) for query in p.predicting for key in range(query) if key not in p.subject_positions],
    ),
    "last": ("from every answer-predicting position to itself", lambda p: [(query, query) for query in p.predicting]),
    "subject_to_earlier": (
        "from the subject to everything before it",
        lambda p: [(query, key) for query in p.subject_positions for key in range(p.subject_span[0])],
    ),
}


@overload
def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    routes: Sequence[str] | Mapping[str, Edges] = ...,
    *,
    by: By | None = ...,
    window: int = ...,
    metric: Metric = ...,
    foils: Sequence[int] | None = ...,
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.DataArray: ...
@overload
def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    routes: Sequence[str] | Mapping[str, Edges] = ...,
    *,
    by: By | None = ...,
    window: int = ...,
    metric: list[Metric],
    foils: Sequence[int] | None = ...,
    backend: BackendName | Backend = ...,
    memory_budget: int | None = ...,
) -> xr.Dataset: ...
def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    routes: Sequence[str] | Mapping[str, Edges] = ("direct", "total"),
    *,
    by: By | None = None,
    window: int = 9,
    metric: Metric | list[Metric] = "answer_logprob",
    foils: Sequence[int] | None = None,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.DataArray | xr.Dataset:
    """How far the answer falls when attention edges are blocked.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        routes: names of routes (see the module's text), or a mapping from names of your own to functions
            that give a prompt's edges `(query, key)`.
        by: block one layer, one window of layers or one head of one layer at a time; None: all layers.
        window: layers of a window, cut off at the first and last layer; Geva et al. use 9.
        metric: one of `answer_logprob` (nats), `logit_diff` (logits), `kl` (nats), `rank`; or several.
        foils: for `logit_diff`, the token id that each prompt's answer is compared with.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, route)`, and `layer` (of a window: its centre) and `head` where asked for. `answer_logprob`
        and `logit_diff` are falls, baseline minus blocked; `kl` and `rank` are those of the blocked run.
        Coordinates `baseline_METRIC` `(fact,)` hold the value with nothing blocked, and the attribute
        `noise_floor` how far a row without a block strays from it. NaN where a prompt has none of a
        route's edges. Where `direct` and `total` are asked for, the coordinate `routes_coincide` `(fact,)` marks the
        prompts in which they are the same edges. Several metrics give a Dataset, as `dataset[[…]]` does.

    Raises:
        BadInput: a prompt ends with its subject, or an argument does not fit.
        UnsupportedModel, NotFired: the edges could not be blocked.
    """
    check_askable(prompts)
    metrics = parse_metrics(metric)
    edges = _parse_routes(routes)
    if ("logit_diff" in metrics and foils is None) or (foils is not None and len(foils) != len(prompts)):
        raise BadInput("metric 'logit_diff' needs foils=[token id, …], one for every prompt")
    hf = hf_model(model)
    n_layers, heads = len(decoder_layers(hf)), n_heads(hf) if by == "head" else 1
    places = _layers(by, n_layers, window)
    asked = list(prompts) if "answer_logprob" in metrics else [shortened(prompt) for prompt in prompts]
    contrasts: list[tuple[int, int] | None] = [None] * len(asked)
    if foils is not None:
        contrasts = [(prompt.answer_ids[0], int(foil)) for prompt, foil in zip(asked, foils, strict=True)]
    rows = [Row(prompt, contrast=contrast) for prompt, contrast in zip(asked, contrasts, strict=True)]
    cells: list[tuple[int, int, int, int]] = []
    for fact, prompt in enumerate(asked):
        for route, of in enumerate(edges.values()):
            if blocked := frozenset(edge for edge in of(prompt) if edge[0] <= prompt.predicting[-1]):
                for layer, layers in enumerate(places):
                    for head in range(heads):
                        block = Block(blocked, layers, (head,) if by == "head" else None)
                        rows.append(Row(prompt, block, contrast=contrasts[fact]))
                        cells.append((fact, route, layer, head))
    run = opened(backend, hf, memory_budget, asked)
    found = measure_rows(run.forward(rows, only_contrast=metrics == ["logit_diff"]), rows, metrics)
    dims: tuple[str, ...] = {None: (), "head": ("layer", "head")}.get(by, ("layer",))
    where = {None: "all layers", "layer": "one layer", "head": "one head of one layer"}.get(
        by, f"windows of {window} layers"
    )
    coincide = {}
    if {"direct", "total"} <= set(edges):
        coincide["routes_coincide"] = ("fact", _same(asked, edges["direct"], edges["total"]))
    arrays = {}
    for name in metrics:
        array = labelled(
            "knockout_drop" if name in CHANGES else f"knockout_{name}",
            _grid(found, name, cells, (len(prompts), len(edges), len(places), heads))[
                (..., *[slice(None) if dim in dims else 0 for dim in ("layer", "head")])
            ],
            prompts,
            ("route", *dims),
            unit=UNITS[name],
            definition=_definition(
                name, " or ".join(f"{_EDGES[r][0]} ({r})" if r in _EDGES else r for r in edges), where
            ),
            paper="Geva et al. 2023 (there: windows of 9 layers, change of the top prediction's probability)",
            noise_floor=found.noise_floor[name],
            backend=run.name,
        )
        arrays[name] = array.assign_coords(
            {"route": list(edges), f"baseline_{name}": ("fact", found.values[name][: len(prompts)])} | coincide
        )
    return arrays[metrics[0]] if isinstance(metric, str) else xr.Dataset(arrays)


def same_edges(prompts: Sequence[Prompt], one: Route = "direct", other: Route = "total") -> np.ndarray:
    """Whether two routes are the same edges in each prompt, so that they cannot be told apart: booleans `(fact,)`.

    Raises:
        BadInput: no such route, or a prompt that ends with its subject.
    """
    check_askable(prompts)
    edges = _parse_routes([one, other])
    return _same(prompts, edges[one], edges[other])


def _same(prompts: Sequence[Prompt], one: Edges, other: Edges) -> np.ndarray:
    return np.array([set(one(prompt)) == set(other(prompt)) for prompt in prompts])


def _parse_routes(routes: Sequence[str] | Mapping[str, Edges]) -> dict[str, Edges]:
    if isinstance(routes, Mapping):
        return dict(routes)
    if isinstance(routes, str) or not routes or (unknown := [name for name in routes if name not in _EDGES]):
        named = routes if isinstance(routes, str) or not routes else unknown
        raise BadInput(f"routes {named!r}: give a list of {', '.join(ROUTES)}, or a mapping from names to edges")
    return {name: _EDGES[name][1] for name in routes}


def _layers(by: str | None, n_layers: int, window: int) -> list[tuple[int, ...] | None]:
    """The layers blocked together, by centre."""
    if by is None:
        return [None]
    if by not in ("layer", "window", "head") or window < 1:
        raise BadInput(
            f"by {by!r} with windows of {window}: by is 'layer', 'window', 'head' or None, a window 1 or more"
        )
    size = window if by == "window" else 1
    return [tuple(range(max(0, c - size // 2), min(n_layers, c - size // 2 + size))) for c in range(n_layers)]


def _grid(
    found: Measured, metric: Metric, cells: list[tuple[int, int, int, int]], shape: tuple[int, ...]
) -> np.ndarray:
    grid = np.full(shape, np.nan)
    if cells:
        effect = found.effect(metric)[-len(cells) :]
        grid[tuple(np.array(cells).T)] = -effect if metric in CHANGES else effect
    return grid


def _definition(metric: Metric, edges: str, layers: str) -> str:
    fall = f"fall in the {MEANINGS[metric]}" if metric in CHANGES else MEANINGS[metric]
    return f"{fall}, when the edges {edges} are blocked before the softmax in {layers}"


CELL = 0.25
"""Forward passes of a prompt that a layer's or head's cell costs, roughly."""


class KnockoutSettings(Settings):
    by: By | None = Field(None, description="beside all layers at once: one layer, window or head at a time")
    window: PositiveInt = Field(9, description="layers of a window")
    facts: PositiveInt = Field(12, description="facts whose knock-out is repeated so")


def _run(asked: Asked, settings: KnockoutSettings) -> xr.Dataset:
    found: xr.Dataset = knockout(asked.model, asked.prompts, **asked.computing).to_dataset()
    asked.tell(2.0 * len(asked.prompts))
    if settings.by is not None:
        few = asked.by_id(asked.order[: settings.facts])
        apart = knockout(asked.model, few, by=settings.by, window=settings.window, **asked.computing)
        apart = apart.drop_vars(["baseline_answer_logprob", "routes_coincide"])
        found[f"knockout_drop_by_{settings.by}"] = apart.rename(
            fact="few_fact", subject="few_subject", answer="few_answer"
        )
        asked.tell(CELL * apart.size / apart.sizes["route"])
    return found


def _route(route: Route) -> Callable[[xr.Dataset], xr.DataArray]:
    definition = _definition("answer_logprob", _EDGES[route][0], "all layers")
    return lambda dataset: dataset["knockout_drop"].sel(route=route, drop=True).assign_attrs(definition=definition)


def _where_routes_differ(route: Route) -> Callable[[xr.Dataset], xr.DataArray]:
    def value(dataset: xr.Dataset) -> xr.DataArray:
        drop = dataset["knockout_drop"].sel(route=route, drop=True)
        return drop.where(~drop["routes_coincide"])

    return value


def _in_parts(dataset: xr.Dataset) -> xr.DataArray:
    """Of facts whose knock-out is repeated part by part, by the direct route unless another alone is there."""
    name = next((name for name in map(str, dataset.data_vars) if name.startswith("knockout_drop_by_")), None)
    if name is None:
        return dataset["knockout_drop"].isel(route=0, drop=True).isel(fact=slice(0))
    drop = dataset[name].rename(few_fact="fact")
    route = drop["route"].values[0] if drop.sizes["route"] == 1 else "direct"
    return drop.sel(route=route, drop=True).mean([dim for dim in ("layer", "head") if dim in drop.dims])


def _cost(shape: Shape, settings: KnockoutSettings) -> float:
    cells = {None: 0, "head": shape.n_layers * shape.n_heads}.get(settings.by, shape.n_layers)
    return 2.0 * shape.n_facts + CELL * settings.facts * cells


MEASURE = Measure(
    name="knockout",
    title="knock-out of the subject",
    paper="Geva et al. 2023",
    quantities=(
        Quantity(
            "knockout_drop",
            "nats",
            _definition("answer_logprob", _EDGES["direct"][0], "all layers"),
            per_fact=_route("direct"),
            smallest_effect=0.1,
        ),
        Quantity(
            "knockout_drop_total",
            "nats",
            _definition("answer_logprob", _EDGES["total"][0], "all layers"),
            per_fact=_route("total"),
            smallest_effect=0.1,
        ),
        Quantity(
            "direct_share",
            "share of the total drop",
            "mean direct drop over mean total drop, over facts in which the two block other edges",
            per_fact=_where_routes_differ("direct"),
            over=_where_routes_differ("total"),
            smallest_effect=0.1,
        ),
        Quantity(
            "knockout_drop_in_parts",
            "nats",
            "fall in the answer's log-probability when the edges are blocked in one layer (window, head) alone, mean "
            "over these, for a few facts; a claim names the parts and the route, else direct",
            per_fact=_in_parts,
            cells={"layer": "mean", "head": "mean", "route": "one"},
        ),
    ),
    run=_run,
    cost=_cost,
    settings=KnockoutSettings,
    needs=frozenset({"subject", "same_prompts"}),
    any_backend=True,
    figure="knockout",
)
