"""What probes read, in a table: accuracy, AUROC, macro-F1 and selectivity with intervals, controls beside them."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.intervals import CONFIDENCE, interval


RESAMPLES = 999
_JUDGED = {"accuracy": ("correct", (0, 1)), "auroc": ("ranked", (0, 1)), "selectivity": ("selectivity", (-1, 1))}
_BESIDE = ("control", "embedding", "characters", "length", "majority", "twin")


def probe_scores(found: xr.Dataset) -> pd.DataFrame:
    """Scores of probes at every place, means over facts.

    Intervals of accuracy, AUROC and selectivity are `interval`'s, facts of one answer together; macro-F1's is a
    bootstrap over subjects. All take the probes as given: they speak of other facts, not of probes trained on others.

    Args:
        found: from `probe` or `probe_across`, or the array of the measure `probe` of a run.

    Returns:
        A row for each place: its labels (`layer`, `role`, …); `n`, the facts tested; `accuracy`, `auroc`, `macro_f1`
        and `selectivity`, each with `…_low` and `…_high` at 95 %; `n_selectivity`, the facts whose name ends with a
        token that others have, of which alone `selectivity` and `control` are; and where they are there `embedding`,
        `characters`, `length`, `majority` and `twin`. NaN where no fact has a value.

    Raises:
        BadInput: a dataset that is no probe's.
    """
    found = found.rename({name: str(name).removeprefix("probe_") for name in found.data_vars})
    if "correct" not in found or "classes" not in found.attrs:
        raise BadInput("scores are of what sa.probe(…) or sa.probe_across(…) gives: it holds no 'correct'")
    places = [str(dim) for dim in found["correct"].dims if dim != "fact"]
    classes = [str(name) for name in np.atleast_1d(found.attrs["classes"])]
    labels = np.array([classes.index(label) if label else -1 for label in found["label"].values.astype(str)])
    subjects = np.unique(found["subject"].values.astype(str), return_inverse=True)[1]
    rows = []
    for at in product(*(found[dim].values.tolist() for dim in places)):
        here = found.sel(dict(zip(places, at, strict=True)))
        row: dict[str, Any] = dict(zip(places, at, strict=True)) | {"n": int(here["correct"].notnull().sum())}
        for name, (variable, bounds) in _JUDGED.items():
            row |= _judged(name, here[variable], bounds)
        row |= _macro_f1(here["predicted"].values, labels, subjects, len(classes))
        row["n_selectivity"] = int(here["selectivity"].notnull().sum())
        row |= {name: float(here[name].mean()) for name in _BESIDE if name in here}
        rows.append(row)
    return pd.DataFrame(rows)


def _judged(name: str, values: xr.DataArray, bounds: tuple[float, float]) -> dict[str, float]:
    if not bool(values.notnull().any()):
        return {name: np.nan, f"{name}_low": np.nan, f"{name}_high": np.nan}
    kept = values[values.notnull().values]
    try:
        low, high = interval(kept.reset_coords(["label", "fold"], drop=True), scope="models", bounds=bounds).ends()
    except BadInput:  # a single fact
        low = high = np.nan
    return {name: float(kept.mean()), f"{name}_low": low, f"{name}_high": high}


def _macro_f1(predicted: np.ndarray, labels: np.ndarray, subjects: np.ndarray, n_classes: int) -> dict[str, float]:
    kept = (predicted >= 0) & (labels >= 0)
    if not kept.any():
        return {"macro_f1": np.nan, "macro_f1_low": np.nan, "macro_f1_high": np.nan}
    given, true = (np.eye(n_classes)[codes[kept]] for codes in (predicted, labels))
    groups = np.unique(subjects[kept], return_inverse=True)[1]
    n = int(groups.max()) + 1
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
    weights = np.concatenate([np.ones((1, len(groups))), drawn[:, groups]])
    both, of_given, of_true = weights @ (given * true), weights @ given, weights @ true
    f1 = np.divide(2 * both, of_given + of_true, out=np.zeros_like(both), where=of_given + of_true > 0)
    scores = f1.sum(1) / (of_true > 0).sum(1)
    low, high = np.quantile(scores[1:], [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return {"macro_f1": float(scores[0]), "macro_f1_low": float(low), "macro_f1_high": float(high)}
