"""What a measure is: a record of all there is to know of it, so that everything else can go through the registry.

A file of this package that defines `MEASURE` is a measure of subjattn; those of other packages come by an entry
point of the group `subjattn.measures` (docs/extending.md adds one).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import BaseModel, ConfigDict

from subjattn.errors import BadInput
from subjattn.registry import discover, named


if TYPE_CHECKING:
    from subjattn.backends import Backend, BackendName
    from subjattn.models import LoadedModel
    from subjattn.models.arms import Arms
    from subjattn.prompts import Prompt, PromptSet

Need = Literal["subject", "same_prompts", "known", "swaps", "base", "facts", "trained", "reference", "known_elsewhere"]
"""`subject`: facts that have one; `same_prompts`: every arm reads the same tokens; `known`: which facts the reference
model answers rightly; `swaps`: pairs of prompts whose subjects are swapped; `base`: a tuned model beside its base;
`facts`: the facts beside their prompts, those of the pool and those that the model was trained on, if any; `trained`:
not defined for a model whose training facts are not known; `reference`: in other arms the reference model's arrays, for
what has to be the same in all; `known_elsewhere`: which facts the reference model answers rightly in another style,
where there is one."""


class Settings(BaseModel):
    """Base of a measure's settings: its section in a study, its options on the command line, part of its key."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Shape:
    """What the cost of a measure depends on."""

    n_facts: int
    n_layers: int
    n_heads: int


PerFact = Callable[[xr.Dataset], xr.DataArray]


@dataclass(frozen=True)
class Quantity:
    """A number that contrasts, claims, tables and figures name.

    Attributes:
        name: under which it is named.
        unit: of its values.
        definition: in words; the array's own, where it says more, stands in its attributes.
        per_fact: from the measure's dataset to one value a fact, `(fact,)` or `(fact, part)`. NaN says that the
            quantity is not defined for the fact; attributes `unit` and `definition`, which may go by the settings,
            stand before the record's. A claim of some cells gives it a dataset of these alone.
        over: makes it a share: the mean of `per_fact` over the mean of this, which is no mean of shares. It is not
            defined where what it is a share of may be 0.
        bounds: between which a value lies, if anything bounds it.
        cells: dimensions whose cells a claim may name, and whether it is the `mean` of several or of `one`.
        smallest_effect: the difference that matters where nobody says another, in its unit; None: none is known,
            and differences are not judged.
    """

    name: str
    unit: str
    definition: str
    per_fact: PerFact
    over: PerFact | None = None
    bounds: tuple[float, float] | None = None
    cells: Mapping[str, Literal["mean", "one"]] = field(default_factory=dict)
    smallest_effect: float | None = None


@dataclass(frozen=True)
class Measure:
    """Everything about one measure.

    Attributes:
        name: in studies and on the command line.
        title: for a reader, in a few words.
        paper: where it comes from.
        quantities: what it gives; none where it is only looked at.
        run: from what is asked and the settings to arrays over `fact` and more.
        cost: forward passes of a prompt, roughly.
        settings: a pydantic model.
        needs: without which it is not defined.
        figure: of `subjattn.plots`, by name.
        control: what stands beside its numbers and would expose an artefact.
        reads: what they may be read as, and what not.
        undefined: when they are not defined, beyond what `needs` says.
        any_backend: whether it goes by `Asked.computing`, so that other backends than the engine can compute it.
        version: raised when its numbers change meaning, so that older ones are made anew.
    """

    name: str
    title: str
    paper: str
    quantities: tuple[Quantity, ...]
    run: Callable[[Asked, Any], xr.Dataset]
    cost: Callable[[Shape, Any], float]
    settings: type[BaseModel] = Settings
    needs: frozenset[Need] = frozenset()
    figure: str | None = None
    control: str = ""
    reads: str = ""
    undefined: str = ""
    any_backend: bool = False
    version: int = 1

    def parse(self, values: dict[str, Any]) -> Any:
        """Settings from plain data, checked."""
        return self.settings.model_validate(values)


@dataclass(frozen=True)
class Asked:
    """What a measure is given.

    Attributes:
        model: whom to ask.
        prompts: facts asked in one style.
        order: facts in a random order that is the same in every arm; measures that take some take the first.
        known: those of them that the reference model answers rightly.
        pairs: ids of clean and corrupt facts, for measures that need `swaps`, pairs of two known facts first.
        backend: what computes it.
        memory_budget: bytes of working memory beyond the weights; None: the usual.
        tell: told of forward passes done.
        arms: the model beside its base, for measures that need `base`.
        relations: by fact id, for measures that need `facts`.
        pool: facts that are not asked, with `relation` and `answers`; None where there are none.
        training: those that the model was trained on, as it was taught them; None where that is not known.
        reference: the reference model's arrays of this measure, for measures that need `reference`; None for that model
            itself, and where nothing is compared.
        known_elsewhere: facts that the reference model answers rightly in another style; None where there is none.
    """

    model: LoadedModel
    prompts: PromptSet
    order: Sequence[str] = ()
    known: frozenset[str] = frozenset()
    pairs: Sequence[tuple[str, str]] = ()
    backend: BackendName | Backend = "engine"
    memory_budget: int | None = None
    tell: Callable[[float], None] = field(default=lambda _units: None)
    arms: Arms | None = None
    relations: Mapping[str, str] = field(default_factory=dict)
    pool: pd.DataFrame | None = None
    training: pd.DataFrame | None = None
    reference: xr.Dataset | None = None
    known_elsewhere: frozenset[str] | None = None

    @property
    def both(self) -> Arms:
        """The model beside its base.

        Raises:
            BadInput: there is no base; what asks has to say `needs` it.
        """
        if self.arms is None:
            raise BadInput("this measure compares a tuned model with its base: give both")
        return self.arms

    @property
    def computing(self) -> dict[str, Any]:
        """The arguments that say how measures compute."""
        return {"backend": self.backend, "memory_budget": self.memory_budget}

    def by_id(self, ids: Sequence[str]) -> list[Prompt]:
        """Prompts of these facts, in this order."""
        found = {prompt.fact_id: prompt for prompt in self.prompts}
        return [found[fact_id] for fact_id in ids]

    def few(self, n: int) -> list[Prompt]:
        """The first facts in the order that is the same in every arm; without one as they stand."""
        return self.by_id(self.order[:n]) or list(self.prompts[:n])


def measures() -> dict[str, Measure]:
    """All measures by name."""
    return discover("subjattn.measures", "MEASURE", "subjattn.measures")


def measure_of(name: str) -> Measure:
    """One measure; BadInput where there is none of that name."""
    return named(measures(), name, "measure")  # type: ignore[no-any-return]


def quantity_of(name: str, among: Sequence[Measure]) -> tuple[Measure, Quantity]:
    """A quantity by its name, and its measure; BadInput where none of these measures gives it."""
    found = {quantity.name: (measure, quantity) for measure in among for quantity in measure.quantities}
    return named(found, name, "quantity")  # type: ignore[no-any-return]


def one_per_fact(variable: str) -> Callable[[xr.Dataset], xr.DataArray]:
    """A quantity that is a variable `(fact,)` as it stands."""
    return lambda dataset: dataset[variable]


def mean_over(variable: str, *dims: str) -> Callable[[xr.Dataset], xr.DataArray]:
    """A quantity that is a variable's mean over these dimensions, which must be all it has beside `fact`."""

    def value(dataset: xr.Dataset) -> xr.DataArray:
        if left := set(dataset[variable].dims) - {"fact", *dims}:
            raise BadInput(f"{variable} has dimensions {sorted(map(str, left))} that nothing says how to reduce")
        attrs = dataset[variable].attrs
        described = f"{attrs['definition']}, mean over {' and '.join(dims)}s" if "definition" in attrs else ""
        return dataset[variable].mean(dims).assign_attrs(attrs | ({"definition": described} if described else {}))

    return value


VALUE_COLUMNS = ["fact_id", "quantity", "part", "value", "over"]


def values_of(measure: Measure, dataset: xr.Dataset) -> list[tuple[str, str, str, float, float]]:
    """Rows `VALUE_COLUMNS` of the measure's quantities; `over` is NaN for those that are no share."""
    rows = []
    for quantity in measure.quantities:
        array = _checked(quantity, quantity.per_fact(dataset))
        over = xr.full_like(array, np.nan, float) if quantity.over is None else quantity.over(dataset)
        over = over.broadcast_like(array).transpose(*array.dims)
        parts = [str(part) for part in array["part"].values] if "part" in array.dims else [""]
        numbers, overs = (np.asarray(one.values, float).reshape(len(array), len(parts)) for one in (array, over))
        rows += [
            (str(fact), quantity.name, part, float(value), float(of))
            for fact, own, others in zip(array["fact"].values, numbers, overs, strict=True)
            for part, value, of in zip(parts, own, others, strict=True)
        ]
    return rows


def _checked(quantity: Quantity, array: xr.DataArray) -> xr.DataArray:
    if array.dims not in (("fact",), ("fact", "part")):
        raise BadInput(f"quantity {quantity.name!r} gave dimensions {array.dims}, not (fact,) or (fact, part)")
    return array
