"""The measure `probe`: what linear probes read of the answer, or of knowing it, in a model's states."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pandas as pd
import xarray as xr
from pydantic import AfterValidator, BeforeValidator, Field

from subjattn.engine.collect import Site
from subjattn.errors import BadInput
from subjattn.measures.probe import PAPER, PLACES, probe
from subjattn.measures.probing import Method
from subjattn.measures.record import Asked, Measure, PerFact, Quantity, Settings, Shape
from subjattn.prompts import ROLES


def _read(roles: Any) -> Any:
    """Roles as a command line gives them, or as it prints the usual ones."""
    return [part.strip(" '") for part in roles.strip("()[] ").split(",")] if isinstance(roles, str) else roles


def _known(roles: tuple[str, ...]) -> tuple[str, ...]:
    if not roles or (unknown := [role for role in roles if role not in ROLES]):
        raise ValueError(f"{repr(unknown[0]) if roles else 'nothing'} is not one of {', '.join(ROLES)}")
    return roles


class ProbeSettings(Settings):
    target: Literal["answer", "relation", "known"] = Field(
        "answer",
        description="the answer, the relation, or whether the reference model (alone: the model itself) knows the fact",
    )
    site: Site = Field("resid_pre", description="of states; of `z` each head by itself")
    roles: Annotated[tuple[str, ...], BeforeValidator(_read), AfterValidator(_known)] = Field(
        PLACES, description="roles of positions, comma-separated"
    )
    method: Method = Field("ridge", description="logistic takes many times as long")
    folds: int = Field(5, ge=2, description="of subjects; labels of fewer subjects are left out")
    twin: bool = Field(False, description="probe a twin of the model with random weights too")
    seed: int = Field(0, ge=0, description="of folds, control labels and twin")


def _run(asked: Asked, settings: ProbeSettings) -> xr.Dataset:
    target: Any = settings.target
    if target == "known":
        known = {prompt.fact_id: prompt.fact_id in asked.known for prompt in asked.prompts}
        target = pd.Series(known, name="known", dtype=object)
    elif target == "relation":
        if not asked.relations:
            raise BadInput("target 'relation': the facts' relations are not known: give facts=…, the table of facts")
        target = pd.Series(asked.relations, name="relation", dtype=object)
    options = settings.model_dump(exclude={"target"})
    dataset = probe(asked.model, asked.prompts, target, **options, memory_budget=asked.memory_budget)
    heads = dataset.sizes.get("head", 1)
    asked.tell(_cost(Shape(len(asked.prompts), dataset.sizes["layer"], heads), settings))
    return dataset.rename({name: f"probe_{name}" for name in dataset.data_vars})


FIT = 0.02
"""Forward passes of a prompt that training and testing a cell's ridge probes costs for each fact, roughly."""


def _cost(shape: Shape, settings: ProbeSettings) -> float:
    cells = shape.n_layers * len(settings.roles) * (shape.n_heads / 4 if settings.site == "z" else 1)
    fit = FIT * (30 if settings.method == "logistic" else 1)
    return shape.n_facts * (1 + settings.twin) * (1 + fit * cells)


def _at_last_token(variable: str) -> PerFact:
    """At the subject's last token (another role if that alone is there), mean over layers and heads."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        array = dataset[variable]
        role = "subject_last" if "subject_last" in array["role"].values else array["role"].values[0]
        return array.sel(role=role, drop=True).mean([dim for dim in ("layer", "head") if dim in array.dims])

    return value


_WHERE = "at the subject's last token, mean over layers (and heads of z); a claim names others"
_CELLS: Mapping[str, Literal["mean", "one"]] = {"layer": "mean", "head": "mean", "role": "one"}


def _quantity(name: str, unit: str, definition: str, bounds: tuple[float, float]) -> Quantity:
    per_fact = _at_last_token(f"probe_{name}")
    called = {"correct": "accuracy", "ranked": "auroc"}.get(name, name)
    return Quantity(f"probe_{called}", unit, f"{definition}, {_WHERE}", per_fact, None, bounds, _CELLS, 0.05)


MEASURE = Measure(
    name="probe",
    title="linear probes of the answer",
    paper=PAPER,
    quantities=(
        _quantity("correct", "share right", "a linear probe, trained on other subjects, gives the label", (0, 1)),
        _quantity(
            "ranked",
            "share of facts",
            "area under the ROC curve, one label against the rest: facts of other labels that the probe ranks lower",
            (0, 1),
        ),
        _quantity("control", "share right", "a probe of labels drawn at random for the name's last token", (0, 1)),
        _quantity("selectivity", "difference of shares", "accuracy minus that of the control", (-1, 1)),
        Quantity(
            "probe_characters",
            "share right",
            "a probe of the name's characters gives the label",
            per_fact=lambda dataset: dataset["probe_characters"],
            bounds=(0, 1),
            smallest_effect=0.05,
        ),
        Quantity(
            "probe_over_characters",
            "difference of shares",
            f"accuracy minus that of a probe of the name's characters, {_WHERE}",
            per_fact=lambda dataset: _at_last_token("probe_correct")(dataset) - dataset["probe_characters"],
            bounds=(-1, 1),
            cells=_CELLS,
            smallest_effect=0.05,
        ),
    ),
    run=_run,
    cost=_cost,
    settings=ProbeSettings,
    needs=frozenset({"subject", "same_prompts", "known", "facts"}),
    figure="probe",
)
