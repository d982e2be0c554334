"""Attention knock-out: what the answer loses when edges are blocked.

Edges are blocked before the softmax, so the remaining weights renormalise (Geva et al. 2023). A route
is a set of edges; those of the subject tell how it reaches the answer:

* `direct`: from every position that predicts an answer token to the subject;
* `total`: from every position after the subject to it, answer tokens included: what the subject is
  worth by any route, relays through the words in between among them;
* `relayed`: those of `total` that are not `direct`: from the words in between to the subject;
* `non_subject`: from every predicting position to all but the subject and itself;
* `last`: from every predicting position to itself;
* `subject_to_earlier`: from the subject to everything before it.

Where one position follows the subject and the answer is one token ("The capital of Kenya is"), `direct` and `total`
are the same edges: that the subject is read directly is then no finding. The coordinate `routes_coincide` says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import numpy as np
import xarray as xr

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.engine.checks import check_model
from subjattn.engine.interventions import Block, Row
from subjattn.errors import BadInput
from subjattn.measures import check_askable, hf_model, labelled, opened, shortened, some_layers, windows
from subjattn.measures.metrics import AS_THEY_ARE, Metric, meaning_of, measure_rows, parse_metrics, unit_of
from subjattn.measures.sets import Heads, parse_sets
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from subjattn.measures import Model

NOTE = (
    "Knock-out by head tells which heads read the subject's name, not which of them move the answer: "
    "patch_grid(component='z') tells that."
)
Route = Literal["direct", "total", "relayed", "non_subject", "last", "subject_to_earlier"]
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
    "relayed": (
        "from every position between the subject and the prediction to the subject",
        lambda p: [(query, key) for query in range(p.subject_span[1], p.prediction) for key in p.subject_positions],
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


IN_WORDS = {route: words for route, (words, _) in _EDGES.items()}


@overload
def knockout(
    model: Model,
    prompts: Sequence[Prompt],
    routes: Sequence[str] | Mapping[str, Edges] = ...,
    *,
    by: By | None = ...,
    window: int = ...,
    heads: Heads | None = ...,
    layers: Sequence[int] | None = ...,
    random_sets: int = ...,
    seed: int = ...,
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
    heads: Heads | None = ...,
    layers: Sequence[int] | None = ...,
    random_sets: int = ...,
    seed: int = ...,
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
    heads: Heads | None = None,
    layers: Sequence[int] | None = None,
    random_sets: int = 0,
    seed: int = 0,
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
        heads: block exactly these `(layer, head)`, all together, as one set.
        layers: with `by`, the layers (centres of windows) to compute; without, block exactly these, all together.
        random_sets: of a set, beside it so many random ones of the same size (see `sets.parse_sets`).
        seed: of the random sets.
        metric: one of `answer_logprob` (nats), `logit_diff` (logits), `kl` (nats), `rank`, or a function of your own
            from the logits that predict the answer's tokens, `[answer, vocab]`, and the prompt to a number; or several.
        foils: for `logit_diff`, the token id that each prompt's answer is compared with.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        `(fact, route)`, and `layer` (of a window: its centre) and `head` where asked for; of sets, `set`: "chosen",
        "random 0", …, with the coordinate `cells`, what is in each, and the attribute `matched`, what random ones have
        in common with the chosen one. `kl` and `rank` are those of the blocked run, all others falls, baseline minus
        blocked.
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
    parts = _parts(hf, by, window, heads, layers, random_sets, seed)
    whole = not {*metrics} <= {"answer_logit", "logit_diff", "kl", "rank"}
    asked = list(prompts) if whole else [shortened(prompt) for prompt in prompts]
    contrasts: list[tuple[int, int] | None] = [None] * len(asked)
    if foils is not None:
        contrasts = [(prompt.answer_ids[0], int(foil)) for prompt, foil in zip(asked, foils, strict=True)]
    rows = [Row(prompt, contrast=contrast) for prompt, contrast in zip(asked, contrasts, strict=True)]
    cells: list[tuple[int, int, int]] = []
    for fact, prompt in enumerate(asked):
        for route, of in enumerate(edges.values()):
            if blocked := frozenset(edge for edge in of(prompt) if edge[0] <= prompt.predicting[-1]):
                rows += [Row(prompt, Block(blocked, *part), contrast=contrasts[fact]) for part in parts.blocks]
                cells += [(fact, route, part) for part in range(len(parts.blocks))]
    run = opened(backend, hf, memory_budget, asked)
    found = measure_rows(run.forward(rows, only_contrast=list(metrics) == ["logit_diff"]), rows, metrics)
    coords = dict(parts.coords)
    if {"direct", "total"} <= set(edges):
        coords["routes_coincide"] = ("fact", _same(asked, edges["direct"], edges["total"]))
    arrays = {}
    for name in metrics:
        grid = np.full((len(prompts), len(edges), len(parts.blocks)), np.nan)
        if cells:
            effect = found.effect(name)[-len(cells) :]
            grid[tuple(np.array(cells).T)] = effect if name in AS_THEY_ARE else -effect
        array = labelled(
            f"knockout_{name}" if name in AS_THEY_ARE else "knockout_drop",
            grid.reshape(*grid.shape[:2], *parts.shape),
            prompts,
            ("route", *parts.dims),
            unit=unit_of(name),
            definition=definition_of(
                name, " or ".join(f"{_EDGES[r][0]} ({r})" if r in _EDGES else r for r in edges), parts.where
            ),
            paper="Geva et al. 2023 (there: windows of 9 layers, change of the top prediction's probability)",
            noise_floor=found.noise_floor[name],
            backend=run.name,
            **parts.attrs,
        )
        arrays[name] = array.assign_coords(
            {"route": list(edges), f"baseline_{name}": ("fact", found.values[name][: len(prompts)])} | coords
        )
    return xr.Dataset(arrays) if isinstance(metric, list) else next(iter(arrays.values()))


def same_edges(prompts: Sequence[Prompt], one: Route = "direct", other: Route = "total") -> np.ndarray:
    """Whether two routes are the same edges in each prompt, so that they cannot be told apart: booleans `(fact,)`.

    Raises:
        BadInput: no such route, or a prompt that ends with its subject.
    """
    check_askable(prompts)
    edges = _parse_routes([one, other])
    return _same(prompts, edges[one], edges[other])


def edges_of(route: Route, prompt: Prompt) -> Iterable[tuple[int, int]]:
    """The edges `(query, key)` that a route is in a prompt."""
    return _EDGES[route][1](prompt)


def other_edges(
    prompt: Prompt, edges: Iterable[tuple[int, int]], rng: np.random.Generator
) -> frozenset[tuple[int, int]]:
    """As many other edges of the same queries, that lead neither to the subject nor to the first token.

    None where there are too few. Queries share keys where they can.
    """
    return edges_in_order(prompt, edges, rng.permutation(len(prompt)).tolist())


def edges_in_order(
    prompt: Prompt, edges: Iterable[tuple[int, int]], order: Sequence[int]
) -> frozenset[tuple[int, int]]:
    """What `other_edges` gives, the first keys of an order; of one of the prompt's they stay while its answer grows."""
    edges = set(edges)
    found: set[tuple[int, int]] = set()
    for query in sorted({query for query, _ in edges}):
        taken = {key for at, key in edges if at == query}
        pool = [key for key in order if 0 < key < query and key not in taken and key not in prompt.subject_positions]
        if len(pool) < len(taken):
            return frozenset()
        found |= {(query, key) for key in pool[: len(taken)]}
    return frozenset(found)


def _same(prompts: Sequence[Prompt], one: Edges, other: Edges) -> np.ndarray:
    return np.array([set(one(prompt)) == set(other(prompt)) for prompt in prompts])


def _parse_routes(routes: Sequence[str] | Mapping[str, Edges]) -> dict[str, Edges]:
    if isinstance(routes, Mapping):
        return dict(routes)
    if isinstance(routes, str) or not routes or (unknown := [name for name in routes if name not in _EDGES]):
        named = routes if isinstance(routes, str) or not routes else unknown
        raise BadInput(f"routes {named!r}: give a list of {', '.join(ROUTES)}, or a mapping from names to edges")
    return {name: _EDGES[name][1] for name in routes}


@dataclass(frozen=True)
class _Parts:
    """Parts of the model whose edges are blocked together: one block each, in the order of the dimensions they have."""

    blocks: list[tuple[Any, ...]]
    dims: tuple[str, ...]
    shape: tuple[int, ...]
    where: str
    coords: dict[str, Any] = field(default_factory=dict)
    attrs: dict[str, Any] = field(default_factory=dict)


def _parts(
    hf: PreTrainedModel,
    by: str | None,
    window: int,
    heads: Heads | None,
    layers: Sequence[int] | None,
    random_sets: int,
    seed: int,
) -> _Parts:
    n_layers = len(decoder_layers(hf))
    if by not in (None, "layer", "window", "head"):
        raise BadInput(f"by={by!r} is none of 'layer', 'window', 'head' and None")
    if window < 1:
        raise BadInput(f"window={window} is no number of layers: give 1 or more")
    if by is not None and (heads is not None or random_sets):
        raise BadInput(f"heads=[…] and random_sets are one set, and by={by!r} takes parts one at a time: leave by out")
    if by is None and heads is None and layers is None:
        if random_sets:
            raise BadInput("random_sets are compared with a set: give heads=[(layer, head), …] or layers=[…]")
        return _Parts([(None, None)], (), (), "all layers")
    if by is None:
        check_model(hf)
        sets = parse_sets(heads, layers, n_layers, n_heads(hf), random_sets=random_sets, seed=seed)
        blocks: list[tuple[Any, ...]] = [
            (None, None, frozenset(cells)) if heads is not None else (tuple(layer for layer, _ in cells), None)
            for cells in sets.cells.values()
        ]
        coords = {"set": list(sets.cells), "cells": ("set", sets.in_words)}
        where = f"a set of {'heads' if heads is not None else 'layers'} together"
        return _Parts(blocks, ("set",), (len(blocks),), where, coords, {"matched": sets.matched})
    some = some_layers(layers, n_layers)
    size = window if by == "window" else 1
    around = [tuple(window) for window in windows(some, size, n_layers)]
    if by == "head":
        check_model(hf)
        every = n_heads(hf)
        blocks = [(at, (head,)) for at in around for head in range(every)]
        note = {"note": NOTE}
        return _Parts(blocks, ("layer", "head"), (len(some), every), "one head of one layer", {"layer": some}, note)
    where = "one layer" if by == "layer" else f"windows of {window} layers"
    return _Parts([(at, None) for at in around], ("layer",), (len(some),), where, {"layer": some})


def definition_of(metric: str, edges: str, layers: str) -> str:
    fall = meaning_of(metric) if metric in AS_THEY_ARE else f"fall in the {meaning_of(metric)}"
    return f"{fall}, when the edges {edges} are blocked before the softmax in {layers}"
