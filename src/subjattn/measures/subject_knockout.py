"""The measure `knockout`: what the answer loses without the subject, its controls, and what sureness cannot move.

Nats fall further in a model that is surer of its answers, whatever is blocked. So beside the fall in log-probability
stand the fall at the model's own temperature, the share of right answers that are lost and the rank of the answer; and
beside the subject as many other edges of the same queries.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Tensor

from subjattn.measures import check_askable, labelled
from subjattn.measures.knockout import IN_WORDS, By, Edges, Route, definition_of, edges_of, knockout, other_edges
from subjattn.measures.record import Asked, Measure, PerFact, Quantity, Settings, Shape
from subjattn.measures.temperature import calibrated
from subjattn.prompts import Prompt


CELL = 0.25
"""Forward passes of a prompt that a layer's or head's cell costs, roughly."""


class KnockoutSettings(Settings):
    by: By | None = Field(None, description="beside all layers at once: one layer, window or head at a time")
    window: PositiveInt = Field(9, description="layers of a window")
    facts: PositiveInt = Field(12, description="facts whose knock-out is repeated so")
    relays: NonNegativeInt = Field(
        12, description="facts whose positions between subject and prediction are blocked singly"
    )


_RANK_RISE = "doublings of the rank of the answer's first token when {} are blocked"


def answered_rightly(logits: Tensor, prompt: Prompt) -> float:
    """Whether every token of the first accepted answer is the likeliest, those before it given."""
    answers = torch.tensor(prompt.answer_ids, device=logits.device)
    return float((logits.argmax(-1) == answers).all())


def _beside_direct(prompt: Prompt) -> Iterable[tuple[int, int]]:
    """As many edges of the same queries that do not lead to the subject: the same ones in every model."""
    rng = np.random.default_rng(zlib.crc32(prompt.fact_id.encode()))
    return other_edges(prompt, edges_of("direct", prompt), rng)


_ROUTES: dict[str, Edges] = {
    "direct": lambda prompt: edges_of("direct", prompt),
    "total": lambda prompt: edges_of("total", prompt),
    "relayed": lambda prompt: edges_of("relayed", prompt),
    "direct_control": _beside_direct,
}


def _run(asked: Asked, settings: KnockoutSettings) -> xr.Dataset:
    at_own, temperature = calibrated(asked.model, asked.prompts)
    metrics: list[Any] = ["answer_logprob", "rank", answered_rightly, at_own]
    whole = knockout(asked.model, asked.prompts, _ROUTES, metric=metrics, **asked.computing)
    asked.tell(4.0 * len(asked.prompts))
    every, beside = whole.sel(route=["direct", "total"]), whole["answer_logprob"].sel(route=list(_ROUTES)[2:])
    rank, right = every["rank"], every["answered_rightly"]
    found = xr.Dataset(
        {
            "knockout_drop": every["answer_logprob"],
            "knockout_calibrated_drop": every["calibrated_logprob"],
            "knockout_rank_rise": xr.apply_ufunc(np.log2, rank / every["baseline_rank"]).assign_attrs(
                rank.attrs | {"unit": "doublings", "definition": _RANK_RISE.format("the edges of a route")}
            ),
            "knockout_lost": (right * every["baseline_answered_rightly"]).assign_attrs(
                right.attrs | {"unit": "share of right answers"}
            ),
            "knockout_drop_beside": beside.rename(route="beside"),
            "temperature": temperature,
        }
    )
    if settings.relays:
        few = asked.few(settings.relays)
        found["relay_drop"] = _few(relay_drop(asked.model, few, **asked.computing), "relay")
        asked.tell(CELL * found["relay_drop"].size)
    if settings.by is not None:
        few = asked.few(settings.facts)
        apart = knockout(asked.model, few, by=settings.by, window=settings.window, **asked.computing)
        found[f"knockout_drop_by_{settings.by}"] = _few(apart, "few")
        asked.tell(CELL * apart.size / apart.sizes["route"])
    return found


def _few(array: xr.DataArray, name: str) -> xr.DataArray:
    """An array of a few facts, as it stands beside those of all."""
    left = [str(coord) for coord in array.coords if str(coord).startswith(("baseline_", "routes_coincide"))]
    return array.drop_vars(left).rename({dim: f"{name}_{dim}" for dim in ("fact", "subject", "answer")})


def relay_drop(model: Any, prompts: Sequence[Prompt], **computing: Any) -> xr.DataArray:
    """Which words between subject and prediction pass the subject on: each blocked by itself, before and behind.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        computing: `backend` and `memory_budget`, as `knockout` takes them.

    Returns:
        `(fact, leg, relay)`, fall of the answer's log-probability in nats: `relay` counts positions from the
        subject's end, `leg` is `reads`, edges from the relay to the subject, or `passes_on`, edges from the
        positions that predict to the relay. NaN where a prompt has no such position. Coordinate `token`.

    Raises:
        BadInput: no prompts, or one that ends with its subject.
    """
    check_askable(prompts)
    most = max(prompt.prediction - prompt.subject_span[1] for prompt in prompts)
    routes: dict[str, Edges] = {}
    for at in range(most):
        routes[f"reads {at}"] = partial(_leg, at, reads=True)
        routes[f"passes_on {at}"] = partial(_leg, at, reads=False)
    if not most:
        values = np.full((len(prompts), 2, 0), np.nan)
    else:
        drop = knockout(model, prompts, routes, **computing)
        values = drop.values.reshape(len(prompts), most, 2).transpose(0, 2, 1)
    tokens = [
        [
            prompt.tokens[prompt.subject_span[1] + at] if at < prompt.prediction - prompt.subject_span[1] else ""
            for at in range(most)
        ]
        for prompt in prompts
    ]
    return labelled(
        "relay_drop",
        values,
        prompts,
        ("leg", "relay"),
        unit="nats",
        definition="fall in the log-probability of the first accepted answer when one position between subject and "
        "prediction does not read the subject (reads), or is not read by those that predict (passes_on), in all layers",
        paper="after Geva et al. 2023",
    ).assign_coords(
        leg=["reads", "passes_on"], token=(("fact", "relay"), np.array(tokens, str).reshape(len(prompts), most))
    )


def _leg(at: int, prompt: Prompt, *, reads: bool) -> list[tuple[int, int]]:
    position = prompt.subject_span[1] + at
    if position >= prompt.prediction:
        return []
    if reads:
        return [(position, key) for key in prompt.subject_positions]
    return [(query, position) for query in prompt.predicting]


def _route(route: Route) -> Callable[[xr.Dataset], xr.DataArray]:
    definition = definition_of("answer_logprob", IN_WORDS[route], "all layers")
    return lambda dataset: dataset["knockout_drop"].sel(route=route, drop=True).assign_attrs(definition=definition)


def _of(variable: str, route: str) -> PerFact:
    return lambda dataset: dataset[variable].sel(route=route, drop=True).assign_attrs(definition="")


def _control(dataset: xr.Dataset) -> xr.DataArray:
    return dataset["knockout_drop_beside"].sel(beside="direct_control", drop=True)


def _right(dataset: xr.Dataset) -> xr.DataArray:
    return dataset["baseline_answered_rightly"].where(dataset["knockout_lost"].sel(route="total", drop=True).notnull())


def _lost(dataset: xr.Dataset) -> xr.DataArray:
    return dataset["knockout_lost"].sel(route="total", drop=True)


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
    return 4.0 * shape.n_facts + CELL * (settings.facts * cells + 4 * min(settings.relays, shape.n_facts))


MEASURE = Measure(
    name="knockout",
    title="knock-out of the subject",
    paper="Geva et al. 2023",
    quantities=(
        Quantity(
            "knockout_drop",
            "nats",
            definition_of("answer_logprob", IN_WORDS["direct"], "all layers"),
            per_fact=_route("direct"),
            smallest_effect=0.1,
        ),
        Quantity(
            "knockout_drop_total",
            "nats",
            definition_of("answer_logprob", IN_WORDS["total"], "all layers"),
            per_fact=_route("total"),
            smallest_effect=0.1,
        ),
        Quantity(
            "knockout_control",
            "nats",
            "fall in the answer's log-probability when as many other edges of the same queries are blocked, that lead "
            "neither to the subject nor to the first token",
            per_fact=_control,
        ),
        Quantity(
            "knockout_over_control",
            "nats",
            f"fall in the answer's log-probability when the edges {IN_WORDS['direct']} are blocked, minus that when as "
            "many other edges of the same queries are, over the facts that have both",
            per_fact=lambda dataset: (_route("direct")(dataset) - _control(dataset)).assign_attrs(unit="nats"),
            smallest_effect=0.1,
        ),
        *(
            Quantity(
                f"knockout_calibrated{after}",
                "nats",
                "fall in the answer's log-probability at the model's own temperature, fitted on other facts, when the "
                f"edges {IN_WORDS[route]} are blocked",
                per_fact=_of("knockout_calibrated_drop", route),
                smallest_effect=0.1,
            )
            for after, route in (("", "direct"), ("_total", "total"))
        ),
        Quantity(
            "knockout_lost",
            "share of right answers",
            f"right answers (every token the likeliest) that are lost when the edges {IN_WORDS['total']} are blocked",
            per_fact=_lost,
            over=_right,
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "knockout_rank_rise",
            "doublings",
            _RANK_RISE.format(f"the edges {IN_WORDS['total']}"),
            per_fact=_of("knockout_rank_rise", "total"),
            smallest_effect=0.5,
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
    control="`knockout_control`: as many other edges of the same queries, that lead neither to the subject nor to the "
    "first token. Some prompts have too few such edges, so its mean covers fewer facts than that of `knockout_drop`. "
    "`knockout_over_control` is the difference over the facts that have both. For sureness: the fall at the model's "
    "own temperature, right answers lost, and the rank of the answer.",
    reads="How far the answer depends on reading the subject's tokens there, the rest of the row renormalised. Not how "
    "much attention there is, and not what the tokens hold. Nats fall further in a surer model: between arms read the "
    "calibrated forms, `knockout_lost` and `knockout_rank_rise`. Where `direct_share` is small the subject arrives by "
    "relay, and attention from the prediction position means little.",
    undefined="`direct_share` of facts in which both routes block the same edges, and where the total drop may be 0; "
    "`knockout_control` where a prompt has too few other edges; calibrated forms where no temperature fits; "
    "`knockout_lost` where no answer may be right; `knockout_drop_in_parts` but with `by`, and then in a few facts.",
    run=_run,
    cost=_cost,
    settings=KnockoutSettings,
    needs=frozenset({"subject", "same_prompts"}),
    any_backend=True,
    figure="knockout",
    version=3,
)
