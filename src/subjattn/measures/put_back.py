"""The measure `transfer`: what a tuned model's answer regains when the base's states are put back, place by place."""

from __future__ import annotations

from collections.abc import Sequence

import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.engine.interventions import Component
from subjattn.measures.record import Asked, Measure, Quantity, Settings, Shape
from subjattn.measures.transfer import At, transfer


CELL = 0.3
"""Forward passes of a prompt that a cell costs, roughly."""
PLACES: dict[str, tuple[Component, At]] = {
    "pattern at prediction": ("pattern", "prediction"),
    "q at prediction": ("q", "prediction"),
    "k at subject": ("k", "subject"),
    "v at subject": ("v", "subject"),
    "z at prediction": ("z", "prediction"),
    "mlp_out at subject": ("mlp_out", "subject"),
    "mlp_out at prediction": ("mlp_out", "prediction"),
}
"""What is put where: what reads at the prediction position, and what is read or made at the subject."""


def places_of(components: Sequence[Component], at: At | None = None) -> dict[str, tuple[Component, At]]:
    """By name, where components are put: `at` one kind of place, or each where `PLACES` has it or the answer is."""
    if at is not None:
        return {f"{one} at {at}": (one, at) for one in components}
    found: dict[str, tuple[Component, At]] = {}
    for component in components:
        usual = {name: place for name, place in PLACES.items() if place[0] == component}
        found |= usual or {f"{component} at prediction": (component, "prediction")}
    return found


class TransferSettings(Settings):
    facts: PositiveInt = Field(8, description="facts in which states are put from one model into the other")
    window: PositiveInt = Field(1, description="layers put together around each")
    by_layer: bool = Field(True, description="layer by layer too, beside all layers together")


def _run(asked: Asked, settings: TransferSettings) -> xr.Dataset:
    few = asked.by_id(asked.order[: settings.facts]) or list(asked.prompts[: settings.facts])
    together, by_layer = [], []
    for component, at in PLACES.values():
        about = {"at": at, "metric": "answer_logprob", **asked.computing}
        together.append(transfer(asked.both, few, component, by=None, **about)["answer_logprob"])  # type: ignore[arg-type]
        asked.tell(CELL * len(few) * 4)
        if settings.by_layer:
            one = transfer(asked.both, few, component, window=settings.window, **about)["answer_logprob"]  # type: ignore[arg-type]
            by_layer.append(one)
            asked.tell(CELL * len(few) * 4 * one.sizes["layer"])
    names = xr.DataArray(list(PLACES), dims="put", name="put")
    found = {"transfer": together} | ({"transfer_by_layer": by_layer} if by_layer else {})
    return xr.Dataset(
        {name: xr.concat(arrays, names, combine_attrs="drop_conflicts") for name, arrays in found.items()}
    )


def _moved(dataset: xr.Dataset, patch: str) -> xr.DataArray:
    """Change of the tuned model's answer when the base's state is put in, `(fact, part)`."""
    cells = dataset["transfer"].sel(patch=patch, drop=True)
    base, tuned = cells["state"].values
    change = cells.sel(state=base, late=tuned, drop=True) - cells.sel(state=tuned, late=tuned, drop=True)
    return change.rename(put="part").transpose("fact", "part").assign_attrs(definition="")


def _gap(dataset: xr.Dataset) -> xr.DataArray:
    cells = dataset["transfer"].sel(patch="real", drop=True).isel(put=0, drop=True)
    base, tuned = cells["state"].values
    return cells.sel(state=tuned, late=tuned, drop=True) - cells.sel(state=base, late=base, drop=True)


def _cost(shape: Shape, settings: TransferSettings) -> float:
    cells = 1 + (shape.n_layers if settings.by_layer else 0)
    return CELL * min(settings.facts, shape.n_facts) * len(PLACES) * 4 * cells


MEASURE = Measure(
    name="transfer",
    title="the base's states put back into the tuned model",
    paper="Prakash et al. 2024",
    quantities=(
        Quantity(
            "put_back",
            "nats",
            "change of the tuned model's answer log-probability when the base's states of all layers are put back at a "
            "place",
            per_fact=lambda dataset: _moved(dataset, "real"),
            smallest_effect=0.1,
        ),
        Quantity(
            "put_back_placebo",
            "nats",
            "the same at as many other positions of the prompt, drawn at random",
            per_fact=lambda dataset: _moved(dataset, "placebo"),
            smallest_effect=0.1,
        ),
        Quantity(
            "tuning_gap",
            "nats",
            "answer log-probability of the tuned model minus its base's, in these facts",
            per_fact=_gap,
            smallest_effect=0.1,
        ),
    ),
    run=_run,
    cost=_cost,
    settings=TransferSettings,
    needs=frozenset({"subject", "same_prompts", "base"}),
    figure="transfer",
)
