"""The measure `trace`: what restoring clean states gives back of an answer that noise on the subject takes away."""

from __future__ import annotations

import xarray as xr
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from subjattn.measures.patching import trivial_cells
from subjattn.measures.record import Asked, Measure, PerFact, Quantity, Settings, one_per_fact
from subjattn.measures.temperature import FITTING, calibrated
from subjattn.measures.trace import Traced, subject_std, trace


CELL = 0.25
"""Forward passes of a prompt that a cell costs, roughly."""
PLACES = 4
"""Roles in which a cell is computed, roughly: those from the subject on that a prompt has."""


EFFECTS = ("total_effect", "indirect_effect")


class TraceSettings(Settings):
    component: Traced = Field("mlp_out", description="what is restored")
    window: PositiveInt = Field(10, description="layers restored together")
    facts: PositiveInt = Field(6, description="facts that are traced, known ones first")
    draws: PositiveInt = Field(5, description="draws of noise for each fact")
    noise: PositiveFloat = Field(3.0, description="noise, in standard deviations of the subjects' embeddings")
    seed: NonNegativeInt = Field(0, description="of the draws of noise")


def _run(asked: Asked, settings: TraceSettings) -> xr.Dataset:
    order = sorted(asked.order, key=lambda fact: fact not in asked.known)
    prompts = asked.by_id(order[: settings.facts])
    at_own, temperature = calibrated(asked.model, asked.prompts)
    found = trace(
        asked.model,
        prompts,
        settings.component,
        window=settings.window,
        noise=settings.noise,
        std=subject_std(asked.model, asked.prompts),
        draws=settings.draws,
        seed=settings.seed,
        metric=["answer_logprob", at_own],
        **asked.computing,
    )
    asked.tell(_cost_of(len(asked.prompts), found.sizes["layer"], settings))
    names = {str(name): str(name).removeprefix("answer_logprob_") for name in found}
    names |= {f"calibrated_logprob_{effect}": f"calibrated_{effect}" for effect in EFFECTS}
    left = [name for name, short in names.items() if short.startswith("calibrated_logprob_")]
    known = [prompt.fact_id in asked.known for prompt in prompts]
    found = found.rename(names).drop_vars(left).assign_coords(known=("fact", known))
    return found.assign(temperature=temperature.sel(fact=found["fact"].values))


def _at_last_token(variable: str) -> PerFact:
    """Indirect effect at the subject's last token (another role if that alone is there), mean over open cells."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        effect = dataset[variable]
        effect = effect.where(~trivial_cells(effect))
        role = effect["role"].values[0] if effect.sizes["role"] == 1 else "subject_last"
        here = effect.sel(role=role, drop=True)
        return here.mean("layer") if "layer" in here.dims else here

    return value


def _cost_of(n_facts: int, n_layers: int, settings: TraceSettings) -> float:
    traced = min(settings.facts, n_facts) * settings.draws * (1 + CELL * PLACES * n_layers)
    return FITTING * n_facts + traced


MEASURE = Measure(
    name="trace",
    title="causal tracing of the subject",
    paper="Meng et al. 2022",
    quantities=(
        Quantity(
            "trace_total_effect",
            "nats",
            "fall in the answer's log-probability by noise on the subject's embeddings, mean over draws",
            per_fact=one_per_fact("total_effect"),
            smallest_effect=0.1,
        ),
        Quantity(
            "trace_indirect_effect",
            "nats",
            "rise in the answer's log-probability under noise when clean states are restored at the subject's last "
            "token (MLP outputs in windows of 10 layers unless set otherwise), mean over draws and over layers that "
            "are not decided by construction; a claim names others",
            per_fact=_at_last_token("indirect_effect"),
            cells={"layer": "mean", "role": "one"},
            smallest_effect=0.1,
        ),
        Quantity(
            "trace_calibrated_total_effect",
            "nats",
            "trace_total_effect in the answer's log-probability at the model's own temperature, fitted on other facts",
            per_fact=one_per_fact("calibrated_total_effect"),
            smallest_effect=0.1,
        ),
        Quantity(
            "trace_calibrated_indirect_effect",
            "nats",
            "trace_indirect_effect in the answer's log-probability at the model's own temperature, fitted on other "
            "facts",
            per_fact=_at_last_token("calibrated_indirect_effect"),
            cells={"layer": "mean", "role": "one"},
            smallest_effect=0.1,
        ),
        Quantity(
            "trace_share",
            "share of the total effect",
            "mean of trace_indirect_effect over mean of trace_total_effect",
            per_fact=_at_last_token("indirect_effect"),
            over=one_per_fact("total_effect"),
            cells={"layer": "mean", "role": "one"},
            smallest_effect=0.1,
        ),
    ),
    control="Several draws of noise a fact, and the interval of the total effect over them in the array; cells that "
    "are decided by construction are left out. For sureness: effects at the model's own temperature.",
    reads="Where a clean state suffices to bring back an answer that noise took away. Not where a fact is stored, nor "
    "where an edit of it would hold. Noised embeddings are like no text, and the effect grows with the noise; it is "
    "set in units of the embeddings that each model has. Nats go by sureness: between arms read the calibrated forms.",
    undefined="`trace_share` where noise may take nothing away; for a prompt that lacks the role; calibrated forms "
    "where no temperature fits.",
    run=_run,
    cost=lambda shape, settings: _cost_of(shape.n_facts, shape.n_layers, settings),
    settings=TraceSettings,
    needs=frozenset({"subject", "same_prompts", "known"}),
    any_backend=True,
    figure="trace",
    version=3,
)
