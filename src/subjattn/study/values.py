"""All quantities per fact of a run in one tidy table, which contrasts and claims pivot."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import xarray as xr

from subjattn.run.folder import Folder
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate


ABOUT = ("out_of_distribution", "relation", "answer", "third")
COLUMNS = ("arm", "draw", "seed", "style", "fact", "quantity", "part", "value", *ABOUT)


def replicates_of(config: StudyConfig, arm: str) -> Sequence[Replicate | None]:
    """The replicates of an arm; one without a number where it is not trained here."""
    return config.replicates.all if config.arms[arm].train else [None]


def collect(config: StudyConfig, folder: Folder) -> pd.DataFrame:
    """The values that measure stages wrote, with the facts' columns `ABOUT` beside them.

    Returns:
        Columns `COLUMNS`; `draw` and `seed` are missing where an arm is not trained here.
    """
    facts = pd.read_parquet(folder.path(files.TEST)).rename(columns={"fact_id": "fact"})
    tables = []
    for arm in config.arms:
        for replicate in replicates_of(config, arm):
            for style in config.styles:
                for measure in config.measures:
                    path = folder.path(files.measured(arm, replicate, style, measure)) / "values.parquet"
                    if path.is_file():
                        draw, seed = replicate or (None, None)
                        found = pd.read_parquet(path).rename(columns={"fact_id": "fact"})
                        tables.append(found.assign(arm=arm, draw=draw, seed=seed, style=style))
    table = pd.concat(tables, ignore_index=True).astype({"draw": "Int64", "seed": "Int64"})
    return table.merge(facts[["fact", *ABOUT]], on="fact", how="left", validate="many_to_one")[list(COLUMNS)]


class Values:
    """The table of values, asked for what contrasts need."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        self._groups = dict(tuple(table.groupby(["arm", "style", "quantity", "part"], sort=False)))

    def parts(self, quantity: str) -> list[str]:
        """The parts that a quantity has; one without a name where it has none."""
        return list(self.table["part"][self.table["quantity"] == quantity].unique())

    def of(self, arm: str, style: str, quantity: str, part: str = "") -> pd.DataFrame | None:
        """Values by fact (rows) and replicate (columns, `(draw, seed)`); None where there are none."""
        group = self._groups.get((arm, style, quantity, part))
        if group is None:
            return None
        numbered = group.assign(draw=group["draw"].fillna(-1).astype(int), seed=group["seed"].fillna(-1).astype(int))
        wide = numbered.pivot(index="fact", columns=["draw", "seed"], values="value")
        return wide.reindex(group["fact"].drop_duplicates())

    def mean_of(self, arm: str, style: str, quantity: str, part: str = "") -> pd.Series | None:
        """One value per fact: mean over replicates, NaN where one of them is not defined."""
        wide = self.of(arm, style, quantity, part)
        return None if wide is None else wide.mean(axis=1, skipna=False)


def datasets(
    config: StudyConfig, folder: Folder, arm: str, style: str, measure: str, facts: pd.DataFrame
) -> list[xr.Dataset]:
    """The arrays of a measure in every replicate of an arm, facts of relations held out left out.

    Empty where the measure is not defined.
    """
    outside = facts.set_index("fact_id")["out_of_distribution"]
    found = []
    for replicate in replicates_of(config, arm):
        path = folder.path(files.measured(arm, replicate, style, measure)) / "array.nc"
        if path.is_file():
            dataset = xr.load_dataset(path, engine="h5netcdf")
            found.append(dataset.isel(fact=~outside.reindex(dataset["fact"].values).to_numpy(bool)))
    return found
