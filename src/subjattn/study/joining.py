"""Arrays of arms and replicates put together along a dimension."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    import xarray as xr


def mean_over_replicates(array: xr.DataArray) -> xr.DataArray:
    """Mean over replicates, of coordinates too; what is missing in one replicate is missing."""
    mean = array.mean("replicate", skipna=False)
    along = {name: of for name, of in array.coords.items() if "replicate" in of.dims and name != "replicate"}
    means = {n: of.all("replicate") if of.dtype == bool else of.mean("replicate") for n, of in along.items()}
    return mean.assign_coords(means)


def joined(arrays: Sequence[xr.DataArray], dim: Any) -> xr.DataArray:
    """Arrays along a new dimension; coordinates that differ between them go along with it."""
    import xarray as xr

    return xr.concat(arrays, dim, join="exact", coords="different", compat="equals", combine_attrs="drop_conflicts")
