"""Which facts belong together: those that share a relation or an answer are no independent evidence."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.squares import cluster_df


USUAL = ("relation", "answer")
"""Coordinates of `fact` that clusters are made by where nothing else is said."""
MIN_DF = 4.0
"""Fewer degrees of freedom say nothing of other clusters."""
ADVISED = 10

Cluster = str | Sequence[str] | np.ndarray | xr.DataArray | pd.Series | None


def clusters_of(
    array: xr.DataArray, cluster: Cluster = None, kept: np.ndarray | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The clusterings that count, as a number for each fact, and what is to be said of them.

    A clustering counts if some clusters hold several facts and there are several of them. Where those asked for by
    default leave under `MIN_DF` degrees of freedom, these very clusters are taken as given, and that is said: the
    interval then speaks of other facts with the same relations (answers), not of other relations.

    Args:
        array: over `fact`.
        cluster: names of coordinates along `fact`, or an array of the facts' labels; none of them (`()`): facts count
            as independent; None: `relation` and `answer`, where the array has them.
        kept: which facts count; none: all. Clusters are those of facts that count.

    Raises:
        BadInput: no such coordinate, or clusters asked for by name that are too few.
    """
    facts = {name for name, of in array.coords.items() if of.dims == ("fact",)}
    if cluster is None:
        names: dict[str, np.ndarray] = {name: array[name].values for name in USUAL if name in facts}
    elif isinstance(cluster, np.ndarray | xr.DataArray | pd.Series):
        if len(cluster) != array.sizes["fact"]:
            raise BadInput(f"cluster has {len(cluster)} labels for {array.sizes['fact']} facts")
        names = {"cluster": np.asarray(cluster)}
    else:
        asked = [cluster] if isinstance(cluster, str) else list(cluster)
        if missing := [name for name in asked if name not in facts]:
            raise BadInput(f"no coordinate {missing[0]!r} along 'fact'; there are {', '.join(sorted(map(str, facts)))}")
        names = {name: array[name].values for name in asked}
    found, notes = {}, []
    for name, labels in names.items():
        codes = codes_of(labels if kept is None else labels[kept])
        n = int(codes.max()) + 1
        if not 1 < n < len(codes):
            continue
        if (df := cluster_df(codes)) < MIN_DF:
            if cluster is not None:
                raise BadInput(
                    f"{n} clusters by {name} leave {df:.1f} degrees of freedom, which says nothing of other clusters: "
                    "use more, or count facts as independent with cluster=()"
                )
            notes.append(f"{n} {name}s of unequal weight are taken as given")
            continue
        if n < ADVISED:
            notes.append(f"clusters by {name}: {n}, where {ADVISED} are advised")
        found[name] = codes
    return found, notes


def codes_of(labels: np.ndarray) -> np.ndarray:
    """A number for each label; facts without a label are on their own."""
    codes, kinds = pd.factorize(np.asarray(labels, object))
    alone = codes < 0
    codes[alone] = len(kinds) + np.arange(alone.sum())
    return codes
