"""Named sets of heads or layers, and routes, fixed before they are looked at: are they needed, and are they enough?

Needed: to ablate them costs more than to ablate random sets that match them in number (and layer). Enough: with all
others of their kind ablated, they keep a stated share of what ablating all of the kind takes away. Whether tuning
changed either is a contrast of two arms.

A route is ablated by blocking its edges. Random sets are then as many other edges of the same queries, and the others
of the kind all other edges from later positions to the subject, so that only `direct` and `relayed` may be enough.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Self

import numpy as np
import xarray as xr
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.measures import hf_model, labelled
from subjattn.measures.ablation import Ablated, At, To, ablation
from subjattn.measures.knockout import Edges, Route, edges_of, knockout, other_edges
from subjattn.measures.metrics import Metric, Own
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape, one_per_fact
from subjattn.measures.temperature import FITTING, calibrated
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = (
    "Wang et al. 2023 (necessity and sufficiency by ablation); random sets after Heimersheim & Nanda 2024; routes "
    "after Geva et al. 2023"
)


class Named(Settings):
    """A set that a hypothesis names."""

    heads: tuple[tuple[int, int], ...] | None = Field(None, description="as [layer, head]")
    layers: tuple[int, ...] | None = Field(None, description="whole layers, of `component` attn_out or mlp_out")
    route: Route | None = Field(None, description="or attention edges, by the name that knockout has for them")
    component: Ablated = Field("z", description="what of heads or layers is ablated")
    at: At = Field("all", description="at which positions")
    to: To = Field("mean", description="what it becomes")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        kinds = [name for name in ("heads", "layers", "route") if getattr(self, name) is not None]
        plain = (self.component, self.at, self.to) == ("z", "all", "mean")
        if len(kinds) != 1 or ("layers" in kinds) == (self.component == "z") or ("route" in kinds and not plain):
            raise ValueError(
                "give heads with component 'z', layers with component 'attn_out' or 'mlp_out', or a route by itself"
            )
        return self


def ablate_hypothesis(
    model: Model,
    prompts: Sequence[Prompt],
    named: Named,
    *,
    at_own: Own | None = None,
    random_sets: int = 8,
    seed: int = 0,
    backend: BackendName | Backend = "engine",
    memory_budget: int | None = None,
) -> xr.Dataset:
    """What the answer's log-probability loses without a set, without random ones, without all others, and without all.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask.
        named: the set.
        at_own: the metric at the model's own temperature (`temperature.calibrated`), for the same in it.
        random_sets: as many that match it in number, heads in layer too, edges in query.
        seed: of the random sets.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        Over `fact`, in nats: `drop`, `random_drop` (mean over the random sets), `others_drop` (all of the kind but the
        set), `all_drop`; with `at_own` also `calibrated_drop` and so on. NaN where `ablation` has nothing to put there;
        of routes, where a prompt has none of the edges or too few others, `others_drop` and `all_drop` but of `direct`
        and `relayed`.

    Raises:
        BadInput: a set outside the model, of all there is, or more random sets than there are.
    """
    metrics: list[Metric] = ["answer_logprob", *([] if at_own is None else [at_own])]
    how: dict[str, Any] = {"metric": metrics, "backend": backend, "memory_budget": memory_budget}
    if named.route is not None:
        found = _without_route(model, prompts, named.route, random_sets, seed, how)
    else:
        found = _without_set(model, prompts, named, random_sets, seed, how)
    kinds = {"answer_logprob": "", "calibrated_logprob": "calibrated_"}
    return xr.Dataset(
        {
            f"{kinds[str(metric)]}{name}": labelled(name, array.values, prompts, unit="nats", paper=PAPER)
            for name, dataset in found.items()
            for metric, array in dataset.items()
        }
    )


def _without_set(
    model: Model, prompts: Sequence[Prompt], named: Named, random_sets: int, seed: int, how: dict[str, Any]
) -> dict[str, xr.Dataset]:
    hf = hf_model(model)
    layers = range(len(decoder_layers(hf)))
    ablated: Any = partial(
        ablation, model, prompts, component=named.component, to=named.to, at=named.at, seed=seed, **how
    )
    every: list[Any]
    chosen: list[Any]
    if named.heads is not None:
        every = [(layer, head) for layer in layers for head in range(n_heads(hf))]
        kind, chosen = "heads", list(named.heads)
    else:
        every, kind, chosen = list(layers), "layers", [*(named.layers or ())]
    own = ablated(**{kind: chosen}, random_sets=random_sets)
    others = ablated(**{kind: [one for one in every if one not in set(chosen)]})
    whole = ablated(**{kind: every})
    return {
        "drop": own.isel(set=0),
        "random_drop": own.isel(set=slice(1, None)).mean("set"),
        "others_drop": others.isel(set=0),
        "all_drop": whole.isel(set=0),
    }


def _without_route(
    model: Model, prompts: Sequence[Prompt], route: Route, random_sets: int, seed: int, how: dict[str, Any]
) -> dict[str, xr.Dataset]:
    edges: dict[str, Edges] = {"drop": partial(edges_of, route)}
    if route in ("direct", "relayed"):
        edges |= {"others_drop": partial(_others, route), "all_drop": partial(edges_of, "total")}
    else:
        edges |= dict.fromkeys(("others_drop", "all_drop"), lambda _: ())
    random = {f"random {number}": partial(_beside, route, [seed, number]) for number in range(random_sets)}
    found = knockout(model, prompts, edges | random, **how)
    return {
        **{name: found.sel(route=name) for name in edges},
        "random_drop": found.sel(route=list(random)).mean("route"),
    }


def _others(route: Route, prompt: Prompt) -> set[tuple[int, int]]:
    return set(edges_of("total", prompt)) - set(edges_of(route, prompt))


def _beside(route: Route, seeds: list[int], prompt: Prompt) -> Iterable[tuple[int, int]]:
    """As many other edges of the same queries: the same ones in every model."""
    rng = np.random.default_rng([zlib.crc32(prompt.fact_id.encode()), *seeds])
    return other_edges(prompt, edges_of(route, prompt), rng)


def _read(sets: Any) -> Any:
    return json.loads(sets) if isinstance(sets, str) else sets


class HypothesesSettings(Settings):
    sets: Annotated[dict[str, Named], BeforeValidator(_read)] = Field(
        {}, description='by name, such as --sets \'{"movers": {"heads": [[17, 5], [23, 4]]}}\''
    )
    random_sets: PositiveInt = Field(8, description="random sets that each is compared with")
    facts: PositiveInt = Field(24, description="facts asked")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if not self.sets:
            raise ValueError("name at least one set: sets: {movers: {heads: [[17, 5], [23, 4]]}}")
        return self


def _run(asked: Asked, settings: HypothesesSettings) -> xr.Dataset:
    few = asked.few(settings.facts)
    at_own, temperature = calibrated(asked.model, asked.prompts)
    how = {"at_own": at_own, "random_sets": settings.random_sets, **asked.computing}
    found = [ablate_hypothesis(asked.model, few, named, **how) for named in settings.sets.values()]
    asked.tell(FITTING * len(asked.prompts) + _passes(settings) * len(few))
    whole: xr.Dataset = xr.concat(found, xr.DataArray(list(settings.sets), dims="part", name="part"))
    return whole.transpose("fact", "part").assign(temperature=temperature.sel(fact=whole["fact"].values))


def _passes(settings: HypothesesSettings) -> float:
    return len(settings.sets) * (3 + settings.random_sets)


def _cost(shape: Shape, settings: HypothesesSettings) -> float:
    return FITTING * shape.n_facts + min(shape.n_facts, settings.facts) * _passes(settings)


MEASURE = Measure(
    name="hypotheses",
    title="sets of heads or layers, and routes: needed, and enough?",
    paper=PAPER,
    quantities=(
        Quantity(
            "necessity",
            "nats",
            "fall in the answer's log-probability when a named set is ablated, minus that of random sets as large",
            per_fact=lambda dataset: dataset["drop"] - dataset["random_drop"],
            smallest_effect=0.1,
        ),
        Quantity(
            "calibrated_necessity",
            "nats",
            "necessity in the answer's log-probability at the model's own temperature, fitted on other facts",
            per_fact=lambda dataset: dataset["calibrated_drop"] - dataset["calibrated_random_drop"],
            smallest_effect=0.1,
        ),
        Quantity(
            "sufficiency",
            "share of what all of the kind do",
            "what is left with all others of the kind ablated, over what ablating all of them takes away",
            per_fact=lambda dataset: dataset["all_drop"] - dataset["others_drop"],
            over=one_per_fact("all_drop"),
            smallest_effect=0.1,
        ),
    ),
    control="Random sets of the same number, heads of the same layers, ablated alike (of a route, as many other edges "
    "of the same queries): `necessity` is over their mean. For sureness: the same at the model's own temperature.",
    reads="Whether a set that was named beforehand is needed more than others of its size, and what share it keeps by "
    "itself. Not what it carries; and heads make up for one another, so that one that is not needed may still do the "
    "work in the model as it is. A set chosen on the very facts that are asked is no hypothesis. Nats go by sureness: "
    "between arms read `calibrated_necessity`.",
    undefined="For a fact that ablation has nothing to put into (`sa.ablation`), and of a route where a prompt has "
    "none of its edges or too few others. `sufficiency` where ablating all of the kind may take nothing away, where a "
    "route is all edges to the subject, and of routes that are not direct or relayed. `calibrated_necessity` where no "
    "temperature fits.",
    run=_run,
    cost=_cost,
    settings=HypothesesSettings,
    needs=frozenset({"subject", "same_prompts"}),
    any_backend=True,
    version=3,
)
