"""All quantities per fact of a run in one tidy table, and what contrasts and claims ask of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.claims import Where
from subjattn.evidence.intervals import Scope
from subjattn.evidence.ratios import ratio
from subjattn.measures.record import Quantity
from subjattn.run.folder import Folder
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate


ABOUT = ("out_of_distribution", "relation", "answer", "third")
COLUMNS = ("arm", "draw", "seed", "style", "fact", "quantity", "part", "value", "over", *ABOUT)


def collect(config: StudyConfig, folder: Folder) -> pd.DataFrame:
    """The values that measure stages wrote, with the facts' columns `ABOUT` beside them.

    Returns:
        Columns `COLUMNS`; `draw` and `seed` are missing where an arm is not trained here. `over` is what a share is
        a share of.
    """
    made = [
        (arm, replicate, style, files.measured(arm, replicate, style, name))
        for arm, replicate, style, name in _made(config)
    ]
    return _tabled(made, folder)[list(COLUMNS)]


def collect_over_training(config: StudyConfig, folder: Folder) -> pd.DataFrame:
    """The same of the weights kept during training, with the column `step`; empty where there are none."""
    made = [
        (arm, replicate, style, files.over_training(arm, replicate, style, measure))
        for arm, replicate, style, measure in _made(config)
        if measure in config.measured_over_training(arm, style)
    ]
    return _tabled(made, folder) if made else pd.DataFrame(columns=[*COLUMNS, "step"])


def _tabled(made: Iterable[tuple[str, Replicate | None, str, str]], folder: Folder) -> pd.DataFrame:
    """Values of stages, with what is known of arms and facts beside them."""
    facts = pd.read_parquet(folder.path(files.TEST)).rename(columns={"fact_id": "fact"})
    tables = []
    for arm, replicate, style, stage in made:
        path = folder.path(stage) / "values.parquet"
        if path.is_file():
            draw, seed = replicate or (None, None)
            found = pd.read_parquet(path).rename(columns={"fact_id": "fact"})
            tables.append(found.assign(arm=arm, draw=draw, seed=seed, style=style))
    table = pd.concat(tables, ignore_index=True).astype({"draw": "Int64", "seed": "Int64"})
    return table.merge(facts[["fact", *ABOUT]], on="fact", how="left", validate="many_to_one")


def _made(config: StudyConfig) -> Iterator[tuple[str, Replicate | None, str, str]]:
    for arm in config.arms:
        for style in config.styles_of(arm):
            for measure in config.measures:
                for replicate in config.replicates_of(arm, measure):
                    yield arm, replicate, style, measure


class Values:
    """The table of values, asked for what contrasts need."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self._groups = dict(tuple(table.groupby(["arm", "style", "quantity", "part"], sort=False)))

    def parts(self, quantity: str) -> list[str]:
        """The parts that a quantity has; one without a name where it has none."""
        return list(self.table["part"][self.table["quantity"] == quantity].unique())

    def of(self, arm: str, style: str, quantity: str, part: str = "", column: str = "value") -> xr.DataArray | None:
        """Values `(fact, draw, seed)`, `(fact)` where an arm is not trained here; None where there are none.

        Coordinates `relation` and `answer` of the facts stand beside them.
        """
        group = self._groups.get((arm, style, quantity, part))
        return None if group is None else labelled(group, group[column])


def labelled(facts: pd.DataFrame, values: pd.Series) -> xr.DataArray:
    """Values with columns `fact`, `draw`, `seed`, `relation` and `answer` beside them, as an array."""
    index = facts["fact"].drop_duplicates()
    about = facts.drop_duplicates("fact")
    coords: dict[str, tuple[str, np.ndarray]] = {
        "fact": ("fact", index.to_numpy(object)),
        "relation": ("fact", about["relation"].to_numpy(object)),
        "answer": ("fact", about["answer"].to_numpy(object)),
    }
    if facts["draw"].isna().all():
        return xr.DataArray(values.to_numpy(float), coords, ("fact",))
    draws, seeds = (sorted(facts[name].unique().astype(int)) for name in ("draw", "seed"))
    array = np.full((len(index), len(draws), len(seeds)), np.nan)
    columns = (index, facts["fact"]), (draws, facts["draw"]), (seeds, facts["seed"])
    places = [pd.Index(list(labels)).get_indexer(column) for labels, column in columns]
    array[tuple(places)] = values.to_numpy(float)
    return xr.DataArray(array, coords | {"draw": ("draw", draws), "seed": ("seed", seeds)}, ("fact", "draw", "seed"))


def share(values: xr.DataArray, over: xr.DataArray | None, scope: Scope | None) -> xr.DataArray:
    """Values whose mean is the quantity's: as they are, or those of a share. BadInput where it is not defined."""
    return values if over is None else ratio(values, over, scope=scope, positive=True)


def datasets(
    config: StudyConfig, folder: Folder, arm: str, style: str, measure: str, facts: pd.DataFrame
) -> dict[Replicate | None, xr.Dataset]:
    """The arrays of a measure in every replicate of an arm, facts of relations held out left out.

    Empty where the measure is not defined.
    """
    outside = facts.set_index("fact_id")["out_of_distribution"]
    found = {}
    for replicate in config.replicates_of(arm, measure):
        path = folder.path(files.measured(arm, replicate, style, measure)) / "array.nc"
        if path.is_file():
            dataset = xr.load_dataset(path, engine="h5netcdf")
            for dim in ("fact", "few_fact"):
                if dim in dataset.dims:
                    dataset = dataset.isel({dim: ~outside.reindex(dataset[dim].values).to_numpy(bool)})
            found[replicate] = dataset
    return found


def some_cells(dataset: xr.Dataset, quantity: Quantity, where: Where) -> xr.Dataset:
    """A dataset of the cells that a claim names: `{layer: 15-20, head: [1, 4], role: subject_last}`.

    Raises:
        BadInput: no such dimension or label, or one that the quantity is not made of.
    """
    for dim, asked in where.items():
        if dim not in quantity.cells or dim not in dataset.dims:
            known = ", ".join(name for name in quantity.cells if name in dataset.dims)
            raise BadInput(f"where: {quantity.name} has no cells by {dim!r}; it has {known or 'none'}")
        labels = dataset[dim].values.tolist() if dim in dataset.coords else list(range(dataset.sizes[dim]))
        each = asked if isinstance(asked, list) else [asked]
        chosen = list(dict.fromkeys(place for one in each for place in _places(one, labels, dim)))
        if quantity.cells[dim] == "one" and len(chosen) > 1:
            raise BadInput(f"where: {quantity.name} is of one {dim}, not of {len(chosen)}: name one")
        dataset = dataset.isel({dim: chosen})
    return dataset


def _places(asked: str | int, labels: list[object], dim: str) -> list[int]:
    first, dash, last = str(asked).partition("-")
    if asked not in labels and dash and first.isdigit() and last.isdigit():
        found = [i for i, label in enumerate(labels) if isinstance(label, int) and int(first) <= label <= int(last)]
        if not found or int(last) not in labels:
            raise BadInput(f"where: {dim} {asked} is not among {labels[0]} to {labels[-1]}")
        return found
    if asked not in labels:
        raise BadInput(f"where: no {dim} {asked!r}; there are {', '.join(map(str, labels[:40]))}")
    return [labels.index(asked)]


Cells = list[Mapping[str, int]]
"""Cells that a rule chose, by their places."""


def in_cells(dataset: xr.Dataset, quantity: Quantity, cells: Cells) -> list[xr.DataArray]:
    """What a quantity is (and what it is a share of) per fact: its mean over cells, each by itself."""
    parts = [dataset.isel({dim: [place] for dim, place in cell.items()}) for cell in cells]
    reductions = [quantity.per_fact, *([quantity.over] if quantity.over else [])]
    return [xr.concat([reduce(part) for part in parts], "cell").mean("cell") for reduce in reductions]


def every_cell(dataset: xr.Dataset, dims: Iterable[str]) -> Cells:
    """All cells along these dimensions."""
    own = list(dims)
    places = itertools.product(*(range(dataset.sizes[dim]) for dim in own))
    return [dict(zip(own, place, strict=True)) for place in places]
