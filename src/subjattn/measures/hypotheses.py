"""Named sets of heads or layers, fixed before they are looked at: are they needed, and are they enough?

Needed: to ablate them costs more than to ablate random sets that match them in number (and layer). Enough: with all
others of their kind ablated, they keep a stated share of what ablating all of the kind takes away. Whether tuning
changed either is a contrast of two arms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Self

import xarray as xr
from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from subjattn.backends import Backend, BackendName
from subjattn.engine.anatomy import decoder_layers, n_heads
from subjattn.measures import hf_model
from subjattn.measures.ablation import Ablated, At, To, ablation
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape, one_per_fact
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

PAPER = "Wang et al. 2023 (necessity and sufficiency by ablation); random sets after Heimersheim & Nanda 2024"


class Named(Settings):
    """A set that a hypothesis names."""

    heads: tuple[tuple[int, int], ...] | None = Field(None, description="as [layer, head]")
    layers: tuple[int, ...] | None = Field(None, description="whole layers, of `component` attn_out or mlp_out")
    component: Ablated = Field("z", description="what of them is ablated")
    at: At = Field("all", description="at which positions")
    to: To = Field("mean", description="what it becomes")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if (self.heads is None) == (self.layers is None) or (self.heads is None) == (self.component == "z"):
            raise ValueError("give heads with component 'z', or layers with component 'attn_out' or 'mlp_out'")
        return self


def ablate_hypothesis(
    model: Model,
    prompts: Sequence[Prompt],
    named: Named,
    *,
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
        random_sets: as many that match it in number, heads in layer too.
        seed: of the random sets.
        backend: what computes it, by name or opened by `subjattn.backends.open_backend`.
        memory_budget: bytes of working memory beyond the weights; None: enough for 2048 tokens at once.

    Returns:
        Over `fact`, in nats: `drop`, `random_drop` (mean over the random sets), `others_drop` (all of the kind but the
        set), `all_drop`. NaN where `ablation` has nothing to put there.

    Raises:
        BadInput: a set outside the model, of all there is, or more random sets than there are.
    """
    hf = hf_model(model)
    layers = range(len(decoder_layers(hf)))
    how: dict[str, Any] = {"component": named.component, "to": named.to, "at": named.at, "seed": seed}
    how |= {"backend": backend, "memory_budget": memory_budget}
    every: list[Any]
    chosen: list[Any]
    if named.heads is not None:
        every = [(layer, head) for layer in layers for head in range(n_heads(hf))]
        kind, chosen = "heads", list(named.heads)
    else:
        every, kind, chosen = list(layers), "layers", [*(named.layers or ())]
    ablated: Any = partial(ablation, model, prompts, **how)
    own = ablated(**{kind: chosen}, random_sets=random_sets)
    others = ablated(**{kind: [one for one in every if one not in set(chosen)]})
    whole = ablated(**{kind: every})
    plain = (
        own.isel(set=0, drop=True)
        .reset_coords(drop=True)
        .assign_coords({name: own[name] for name in ("subject", "answer")})
    )
    attrs = {"unit": "nats", "paper": PAPER}
    found = {
        "drop": own.isel(set=0),
        "random_drop": own.isel(set=slice(1, None)).mean("set"),
        "others_drop": others.isel(set=0),
        "all_drop": whole.isel(set=0),
    }
    return xr.Dataset({name: plain.copy(data=values.values).assign_attrs(attrs) for name, values in found.items()})


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
    found = [
        ablate_hypothesis(asked.model, few, named, random_sets=settings.random_sets, **asked.computing)
        for named in settings.sets.values()
    ]
    asked.tell(_passes(settings) * len(few))
    whole: xr.Dataset = xr.concat(found, xr.DataArray(list(settings.sets), dims="part", name="part"))
    return whole.transpose("fact", "part")


def _passes(settings: HypothesesSettings) -> float:
    return len(settings.sets) * (3 + settings.random_sets)


def _cost(shape: Shape, settings: HypothesesSettings) -> float:
    return min(shape.n_facts, settings.facts) * _passes(settings)


MEASURE = Measure(
    name="hypotheses",
    title="sets of heads or layers: needed, and enough?",
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
            "sufficiency",
            "share of what all of the kind do",
            "what is left with all others of the kind ablated, over what ablating all of them takes away",
            per_fact=lambda dataset: dataset["all_drop"] - dataset["others_drop"],
            over=one_per_fact("all_drop"),
            smallest_effect=0.1,
        ),
    ),
    control="Random sets of the same number, heads of the same layers, ablated alike: `necessity` is over their mean.",
    reads="Whether a set that was named beforehand is needed more than others of its size, and what share it keeps by "
    "itself. Not what it carries; and heads make up for one another, so that one that is not needed may still do the "
    "work in the model as it is. A set chosen on the very facts that are asked is no hypothesis.",
    undefined="For a fact that ablation has nothing to put into (`sa.ablation`). `sufficiency` where ablating all of "
    "the kind may take nothing away.",
    run=_run,
    cost=_cost,
    settings=HypothesesSettings,
    needs=frozenset({"subject", "same_prompts"}),
    any_backend=True,
)
