"""Measures `transfer` and `transfer_by_layer`: what a tuned model's answer regains of its base's states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import xarray as xr
from pydantic import Field, PositiveInt

from subjattn.engine.interventions import Component
from subjattn.measures.record import Asked, Measure, Need, Quantity, Settings, Shape
from subjattn.measures.transfer import At, transfer


CELL = 0.3
"""Forward passes of a prompt that a cell of one layer costs, roughly."""
TOGETHER = 4.5
"""Those that the four cells of all layers together cost, with the runs that states are taken from."""
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

PAPER = "Prakash et al. 2024"
NEEDS: frozenset[Need] = frozenset({"subject", "same_prompts", "base"})


def places_of(components: Sequence[str], at: At | None = None) -> dict[str, tuple[Component, At]]:
    """By name, where components are put: `at` one kind of place, or each where `PLACES` has it or the answer is.

    A name of `PLACES` is that one.
    """
    if at is not None:
        return {f"{one} at {at}": (one, at) for one in components}  # type: ignore[misc]
    found: dict[str, tuple[Component, At]] = {}
    for component in components:
        usual = {name: place for name, place in PLACES.items() if component in (name, place[0])}
        found |= usual or {f"{component} at prediction": (component, "prediction")}  # type: ignore[dict-item]
    return found


class TransferSettings(Settings):
    facts: PositiveInt = Field(8, description="facts in which states are put from one model into the other")


class LayerSettings(TransferSettings):
    window: PositiveInt = Field(1, description="layers put together around each")


def _run(asked: Asked, settings: TransferSettings) -> xr.Dataset:
    return xr.Dataset({"transfer": _put(asked, settings.facts, by=None)})


def _run_by_layer(asked: Asked, settings: LayerSettings) -> xr.Dataset:
    return xr.Dataset({"transfer_by_layer": _put(asked, settings.facts, window=settings.window)})


def _put(asked: Asked, n_facts: int, **how: Any) -> xr.DataArray:
    """Every place in turn, along `put`."""
    few, found = asked.few(n_facts), []
    for component, at in PLACES.values():
        about = {"at": at, "metric": "answer_logprob", **asked.computing, **how}
        found.append(transfer(asked.both, few, component, **about)["answer_logprob"])
        asked.tell(len(few) * _passes(found[-1].sizes.get("layer")))
    names = xr.DataArray(list(PLACES), dims="put", name="put")
    return xr.concat(found, names, combine_attrs="drop_conflicts").transpose("fact", ...)


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


def _passes(n_layers: int | None) -> float:
    """Of one fact at one place; None: all layers together."""
    return TOGETHER if n_layers is None else 4 * CELL * n_layers


def _cost(shape: Shape, settings: TransferSettings, n_layers: int | None = None) -> float:
    return min(settings.facts, shape.n_facts) * len(PLACES) * _passes(n_layers)


MEASURE = (
    Measure(
        name="transfer",
        title="the base's states put back into the tuned model",
        paper=PAPER,
        quantities=(
            Quantity(
                "put_back",
                "nats",
                "change of the tuned model's answer log-probability when the base's states of all layers are put back "
                "at a place",
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
        control="`put_back_placebo`: the base's states at as many other positions of the same prompt, drawn at random.",
        reads="What the base's states at a place are worth in the tuned model: above 0 and above the placebo, tuning "
        "lost that much by what it changed up to there. Not that the rest is as it was: later layers of one model meet "
        "states of another, and may overshoot; the array holds all four cells, and `returned` reads shares off them. "
        "Nats go by sureness (`transfer_accuracy`).",
        undefined="The placebo where a prompt has too few other positions.",
        run=_run,
        cost=_cost,
        settings=TransferSettings,
        needs=NEEDS,
        version=2,
    ),
    Measure(
        name="transfer_by_layer",
        title="the base's states put back into the tuned model, one layer at a time",
        paper=PAPER,
        quantities=(),
        control="The placebo in the array: as many other positions of the same prompt.",
        reads="As `transfer`, layer by layer: a map to look at. States hold what earlier layers did, so that a high "
        "value late does not say that tuning acted late.",
        undefined="It has no numbers per fact; the placebo is NaN where a prompt has too few other positions.",
        run=_run_by_layer,
        cost=lambda shape, settings: _cost(shape, settings, shape.n_layers),
        settings=LayerSettings,
        needs=NEEDS,
        figure="transfer",
        version=2,
    ),
)
