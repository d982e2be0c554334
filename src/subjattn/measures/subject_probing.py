"""The measures `probe`, what linear probes read of a label in a model's states, and `probe_across`, in two models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import pandas as pd
import xarray as xr
from pydantic import AfterValidator, BeforeValidator, Field

from subjattn.engine.collect import Site
from subjattn.errors import BadInput
from subjattn.measures.probe import PAPER, PLACES, probe, probe_across
from subjattn.measures.probing import Method
from subjattn.measures.record import Asked, Measure, PerFact, Quantity, Settings, Shape, one_per_fact
from subjattn.prompts import ROLES


def _read(roles: Any) -> Any:
    """Roles as a command line gives them, or as it prints the usual ones."""
    return [part.strip(" '") for part in roles.strip("()[] ").split(",")] if isinstance(roles, str) else roles


def _known(roles: tuple[str, ...]) -> tuple[str, ...]:
    if not roles or (unknown := [role for role in roles if role not in ROLES]):
        raise ValueError(f"{repr(unknown[0]) if roles else 'nothing'} is not one of {', '.join(ROLES)}")
    return roles


class AcrossSettings(Settings):
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
    seed: int = Field(0, ge=0, description="of folds, control labels and a twin")


class ProbeSettings(AcrossSettings):
    twin: bool = Field(False, description="probe a twin of the model with random weights too")


def _target(asked: Asked, target: str) -> Any:
    """Labels as `probe` takes them."""
    if target == "known":
        known = {prompt.fact_id: prompt.fact_id in asked.known for prompt in asked.prompts}
        return pd.Series(known, name="known", dtype=object)
    if target == "relation":
        if not asked.relations:
            raise BadInput("target 'relation': the facts' relations are not known: give facts=…, the table of facts")
        return pd.Series(asked.relations, name="relation", dtype=object)
    return target


def _run(asked: Asked, settings: ProbeSettings) -> xr.Dataset:
    options = settings.model_dump(exclude={"target"}) | {"memory_budget": asked.memory_budget}
    found = probe(asked.model, asked.prompts, _target(asked, settings.target), **options)
    asked.tell(_cost(_shape(found), settings))
    return found.rename({name: f"probe_{name}" for name in found.data_vars})


def _run_across(asked: Asked, settings: AcrossSettings) -> xr.Dataset:
    options = settings.model_dump(exclude={"target"}) | {"memory_budget": asked.memory_budget}
    arms = asked.both
    if len(arms.sources) != 1:
        raise BadInput(f"there are several arms, {', '.join(arms.sources)}: load one beside its base")
    found = probe_across(arms, asked.prompts, _target(asked, settings.target), **options)
    asked.tell(_cost_across(_shape(found), settings))
    found = found.assign_coords(trained_on=["base", "tuned"], tested_on=["base", "tuned"])
    return found.rename({name: f"across_{name}" for name in found.data_vars})


def _shape(found: xr.Dataset) -> Shape:
    return Shape(found.sizes["fact"], found.sizes["layer"], found.sizes.get("head", 1))


FIT = 0.02
"""Forward passes of a prompt that training and testing a cell's ridge probes costs for each fact, roughly."""


def _cost(shape: Shape, settings: ProbeSettings) -> float:
    return (1 + settings.twin) * _cost_of_one(shape, settings)


def _cost_across(shape: Shape, settings: AcrossSettings) -> float:
    return 2 * _cost_of_one(shape, settings)


def _cost_of_one(shape: Shape, settings: AcrossSettings) -> float:
    cells = shape.n_layers * len(settings.roles) * (shape.n_heads / 4 if settings.site == "z" else 1)
    fit = FIT * (30 if settings.method == "logistic" else 1)
    return shape.n_facts * (1 + fit * cells)


def _at_last_token(variable: str) -> PerFact:
    """At the subject's last token (another role if that alone is there), mean over layers and heads."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        array = dataset[variable]
        role = "subject_last" if "subject_last" in array["role"].values else array["role"].values[0]
        return array.sel(role=role, drop=True).mean([dim for dim in ("layer", "head") if dim in array.dims])

    return value


def _minus(of: PerFact, other: PerFact) -> PerFact:
    """A difference, whose definition is the quantity's."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        found = of(dataset) - other(dataset)
        found.attrs = {}
        return found

    return value


def _across(trained_on: str, tested_on: str) -> PerFact:
    accuracy = _at_last_token("across_correct")
    return lambda dataset: accuracy(dataset.sel(trained_on=trained_on, tested_on=tested_on, drop=True))


_WHERE = "at the subject's last token, mean over layers (and heads of z); a claim names others"
_CELLS: Mapping[str, Literal["mean", "one"]] = {"layer": "mean", "head": "mean", "role": "one"}


def _quantity(name: str, unit: str, definition: str, bounds: tuple[float, float]) -> Quantity:
    per_fact = _at_last_token(f"probe_{name}")
    called = {"correct": "accuracy", "ranked": "auroc"}.get(name, name)
    return Quantity(f"probe_{called}", unit, f"{definition}, {_WHERE}", per_fact, None, bounds, _CELLS, 0.05)


PROBE = Measure(
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
        *(
            Quantity(name, "share right", f"{words} gives the label", one_per_fact(name), None, (0, 1), {}, 0.05)
            for name, words in (
                ("probe_characters", "a probe of the name's characters"),
                ("probe_length", "a probe of how many tokens, words and characters the name has"),
            )
        ),
        Quantity(
            "probe_over_characters",
            "difference of shares",
            f"accuracy minus that of a probe of the name's characters, {_WHERE}",
            per_fact=_minus(_at_last_token("probe_correct"), lambda dataset: dataset["probe_characters"]),
            bounds=(-1, 1),
            cells=_CELLS,
            smallest_effect=0.05,
        ),
    ),
    control="`probe_control` and `probe_selectivity`: labels drawn at random for the name's last token, which a probe "
    "can learn by heart as it can the true ones; `probe_characters` and `probe_length`: what the name's spelling and "
    "its number of tokens give away. In the array the token embeddings, the majority and, with `twin`, a model with "
    "random weights.",
    reads="Whether a label can be read from a state by a linear map, in subjects that it was not trained on. Not that "
    "the model reads it, nor that it would answer by it (`patching`, `transfer`). Accuracy alone is no finding: read "
    "selectivity, and compare with the characters and the length. Every state encodes how many tokens a name has, so "
    "a probe reads a label that correlates with length without any knowledge, and the control does not show it. No "
    "largest layer is a result, since it would be chosen on the facts that it is measured on.",
    undefined="For facts whose label has fewer subjects than there are folds; `probe_control` and `probe_selectivity` "
    "where no training fact of another subject has the name's last token; for a prompt that lacks the role. Fewer than "
    "two labels of enough subjects are refused.",
    run=_run,
    cost=_cost,
    settings=ProbeSettings,
    needs=frozenset({"subject", "same_prompts", "known", "facts"}),
    figure="probe",
    version=2,
)

ACROSS = Measure(
    name="probe_across",
    title="probes of the base and of the tuned model, each tested on both",
    paper=PAPER,
    quantities=(
        Quantity(
            "probe_erased",
            "difference of shares",
            "accuracy of the base's own probe minus that of the tuned model's own: what a linear probe no longer "
            f"finds, {_WHERE}",
            per_fact=_minus(_across("base", "base"), _across("tuned", "tuned")),
            bounds=(-1, 1),
            cells=_CELLS,
            smallest_effect=0.05,
        ),
        Quantity(
            "probe_moved",
            "difference of shares",
            "accuracy in the tuned model of its own probe minus that of the base's: what is there and where the base's "
            f"probe does not look, {_WHERE}",
            per_fact=_minus(_across("tuned", "tuned"), _across("base", "tuned")),
            bounds=(-1, 1),
            cells=_CELLS,
            smallest_effect=0.05,
        ),
    ),
    control="All four cells stand in the array, with the same folds, labels and control task: each model's own probe "
    "in its own states is what the crossed ones are held against.",
    reads="`probe_moved`: the label is in the tuned model's states, where the base's probe does not look. "
    "`probe_erased`: a linear probe finds it less often than in the base. Not that it is gone: another map might read "
    "it. Not that either model uses it.",
    undefined="As `probe`.",
    run=_run_across,
    cost=_cost_across,
    settings=AcrossSettings,
    needs=frozenset({"subject", "same_prompts", "known", "facts", "base"}),
)

MEASURE = (PROBE, ACROSS)
