"""What contrasts and claims are about, as arrays over facts and replicates that `evidence` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from typing import Any, TypeVar

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim, Where
from subjattn.evidence.intervals import Interval, Scope, difference, interval
from subjattn.measures.record import Measure, Quantity, quantity_of
from subjattn.run.folder import Folder
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate
from subjattn.study.values import Cells, Values, datasets, every_cell, in_cells, labelled, share, some_cells


@dataclass(frozen=True)
class Tested:
    """What is put to the test: its interval, and its value in each replicate, by name."""

    interval: Interval
    replicates: dict[str, float]


class Terms:
    """The values of one run, asked for by arm, style and quantity.

    Args:
        config: the study.
        folder: its finished stages.
        values: of facts that are not held out by relation.
        facts: those tested.
    """

    def __init__(self, config: StudyConfig, folder: Folder, values: Values, facts: pd.DataFrame) -> None:
        self.config, self.folder, self.values, self.facts = config, folder, values, facts
        self._held: dict[tuple[str, str, str], dict[Replicate | None, xr.Dataset]] = {}

    @cached_property
    def _about(self) -> pd.DataFrame:
        return self.facts.rename(columns={"fact_id": "fact"}).set_index("fact")[["relation", "answer"]]

    def datasets(self, arm: str, style: str, measure: str) -> dict[Replicate | None, xr.Dataset]:
        """Arrays of one measure by replicate, kept for a while."""
        key = (arm, style, measure)
        if key not in self._held:
            if len(self._held) > len(self.config.measures) * 2:
                self._held.clear()
            self._held[key] = datasets(self.config, self.folder, arm, style, measure, self.facts)
        return self._held[key]

    def raw(
        self, arm: str, style: str, name: str, where: Where | None = None, cells: Cells | None = None
    ) -> list[xr.DataArray]:
        """Values `(fact, draw, seed)` of a quantity of one arm, and what they are a share of where they are.

        Raises:
            BadInput: it is not defined there.
        """
        measure, quantity, part = self.named(name)
        if where or cells is not None:
            own = self._of_cells(arm, style, measure, quantity, where or {}, cells)
        else:
            columns = ["value", "over"] if quantity.over else ["value"]
            found = [self.values.of(arm, style, quantity.name, part, column) for column in columns]
            own = [array for array in found if array is not None]
        if not own or not bool(own[0].notnull().any()):
            stage = files.measured(arm, self.config.replicates_of(arm, measure.name)[0], style, measure.name)
            raise BadInput(files.not_defined(self.folder.path(stage)) or "no fact has a value")
        return own

    def named(self, name: str) -> tuple[Measure, Quantity, str]:
        """The measure, quantity and part of `quantity` or `quantity.part`."""
        own, _, part = name.partition(".")
        return *quantity_of(own, self.config.measured), part

    def contrast(self, quantity: str, a: str, b: str, style: str) -> Tested:
        """One arm minus another; BadInput where it is not defined."""
        return self._tested([self.raw(arm, style, quantity) for arm in (a, b)], [1, -1], [quantity] * 2, {a, b}, None)

    def arm(self, quantity: str, arm: str, style: str) -> Tested:
        """One arm by itself; BadInput where it is not defined."""
        return self._tested([self.raw(arm, style, quantity)], [1], [quantity], {arm}, None)

    def claim(self, claim: Claim, style: str) -> Tested:
        """A claim's value in a style.

        Raises:
            BadInput: it is not defined, or rests on cells or replicates that are not there.
        """
        cells = None if claim.select is None else self._selected(claim, style)
        raw: list[list[xr.DataArray]] = []
        signs: list[float] = []
        names: list[str] = []
        arms: set[str] = set()
        for sign, name, own_arms, own_style, where in claim.sides:
            for arm, turn in zip(own_arms, (1, -1), strict=False):
                found = self.raw(arm, own_style or style, name, where, cells)
                raw.append([self._left_for_test(claim, values) for values in found])
                signs.append(sign * turn)
                names.append(name)
                arms.add(arm)
        return self._tested(raw, signs, names, arms, claim.scope)

    def _tested(
        self, raw: list[list[xr.DataArray]], signs: list[float], names: list[str], arms: set[str], scope: Scope | None
    ) -> Tested:
        raw = _jointly(raw)
        first, *others = (sign * share(*_pair(own), scope) for own, sign in zip(raw, signs, strict=True))
        values = reduce(lambda a, b: difference(a, -b), others, first)
        own = [self.named(name)[1].bounds for name in names]
        if any(bounds is None for bounds in own):
            found = interval(values, scope=scope, models=len(arms))
        else:
            each = [_of_values(bounds or (0, 0), of) for bounds, of in zip(own, raw, strict=True)]
            found = interval(values, scope=scope, bounds=_summed(each, signs), models=len(arms))
            found = replace(found, bounds=_summed([bounds or (0, 0) for bounds in own], signs))
        return Tested(found, _each_replicate(raw, signs))

    @staticmethod
    def _left_for_test(claim: Claim, values: xr.DataArray) -> xr.DataArray:
        """Without the draws that cells were chosen on."""
        on = claim.select.on if claim.select else None
        return values.sel(draw=values["draw"] >= on) if isinstance(on, int) and "draw" in values.dims else values

    def _of_cells(
        self, arm: str, style: str, measure: Measure, quantity: Quantity, where: Where, cells: Cells | None
    ) -> list[xr.DataArray]:
        tables: list[list[pd.DataFrame]] = []
        for replicate, dataset in self.datasets(arm, style, measure.name).items():
            draw, seed = replicate or (None, None)
            some = some_cells(dataset, quantity, where)
            arrays = in_cells(some, quantity, every_cell(some, where) if cells is None else cells)
            if any(array.dims != ("fact",) for array in arrays):
                raise BadInput(f"cells of {quantity.name!r} leave dimensions {arrays[0].dims}: name a part by where")
            tables.append(
                [pd.DataFrame({"fact": one["fact"].values, "draw": draw, "seed": seed, "value": one}) for one in arrays]
            )
        found = []
        for own in zip(*tables, strict=True):
            table = pd.concat(own, ignore_index=True).join(self._about, on="fact")
            found.append(labelled(table, table["value"]))
        return found

    def _selected(self, claim: Claim, style: str) -> Cells:
        """The cells where a claim's quantity is largest, in the reference model or in the draws chosen on."""
        select = claim.select
        assert select is not None
        measure, quantity, _ = self.named(claim.measure)
        arms = [self.config.untrained] if select.on == "reference" else list(claim.arms)
        sources = [
            some_cells(dataset, quantity, claim.where)
            for arm in arms
            for replicate, dataset in self.datasets(arm, style, measure.name).items()
            if select.on == "reference" or replicate is None or replicate[0] < int(select.on)
        ]
        if not sources:
            raise BadInput(f"{measure.name} has no arrays in style {style!r} to choose cells on")
        if missing := [dim for dim in select.over if dim not in sources[0].dims or quantity.cells.get(dim) != "mean"]:
            raise BadInput(f"select: {quantity.name} has no cells by {missing[0]!r}")
        every = every_cell(sources[0], select.over)
        sizes = [np.mean([_mean(source, quantity, cell) for source in sources]) for cell in every]
        order = np.argsort(-np.nan_to_num(np.array(sizes), nan=-np.inf), kind="stable")[: select.top]
        return [every[int(i)] for i in order]


def _mean(dataset: xr.Dataset, quantity: Quantity, cell: Mapping[str, int]) -> float:
    own = [float(array.mean()) for array in in_cells(dataset, quantity, [cell])]
    return own[0] / own[1] if len(own) > 1 else own[0]


def _of_values(bounds: tuple[float, float], raw: list[xr.DataArray]) -> tuple[float, float]:
    """Between what a quantity's values lie; those of a share (`ratio`) reach as far as one fact can move it."""
    if len(raw) == 1:
        return bounds
    share, most = float(raw[0].mean()) / float(raw[1].mean()), float(raw[1].max()) / float(raw[1].mean())
    low, high = (share + (end - share) * most for end in bounds)
    return low - 1e-9, high + 1e-9


def _summed(bounds: list[tuple[float, float]], signs: list[float]) -> tuple[float, float]:
    """Of a sum of quantities, some of them subtracted."""
    ends = [sorted(sign * end for end in of) for of, sign in zip(bounds, signs, strict=True)]
    return sum(low for low, _ in ends), sum(high for _, high in ends)


def _pair(own: list[xr.DataArray]) -> tuple[xr.DataArray, xr.DataArray | None]:
    return own[0], own[1] if len(own) > 1 else None


def _jointly(raw: list[list[xr.DataArray]]) -> list[list[xr.DataArray]]:
    """Shares stand on the facts and replicates that count in all terms; other quantities as they are."""
    if not any(len(own) > 1 for own in raw):
        return raw
    every = [array.notnull() for own in raw for array in own]
    joint = reduce(lambda a, b: difference(a.astype(float), -b.astype(float)) == 2, every)
    return [[array.where(joint) for array in own] for own in raw]


def _each_replicate(raw: list[list[xr.DataArray]], signs: list[float]) -> dict[str, float]:
    """The value in each replicate by itself: shares are its own ratio; those without a value are left out."""
    parts = [own[0].mean("fact") / (own[1].mean("fact") if len(own) > 1 else 1.0) for own in raw]
    first, *others = (sign * part for part, sign in zip(parts, signs, strict=True))
    value = reduce(lambda a, b: a + b, others, first)
    if "draw" not in value.dims or value.size < 2:
        return {}
    return {
        f"draw{int(draw)}-seed{int(seed)}": float(one)
        for draw in value["draw"].values
        for seed in value["seed"].values
        if np.isfinite(one := value.sel(draw=draw, seed=seed))
    }


T = TypeVar("T")


def or_reason(compute: Callable[..., T], *arguments: Any) -> tuple[T | None, str]:
    """What is computed, or None and why it is refused."""
    try:
        return compute(*arguments), ""
    except BadInput as error:
        return None, str(error)
