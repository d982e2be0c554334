"""From the arrays of one-layer worlds to tables: accuracy, attention and errors by arm, gaps with their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from scipy import stats

from subjattn.theory.gap import ERRORS


SHARES = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
"""Top shares of test subjects by popularity, as in fig. 2a."""
TERCILES = ("low", "middle", "high")
CELL = ("world", "zipf", "pretraining", "finetuning")
PATTERNS = {
    (1, 1): "accuracy and attention fall (the paper's)",
    (1, 0): "accuracy falls, attention does not differ",
    (1, -1): "accuracy falls, attention rises",
    (0, 1): "attention falls alone",
    (0, 0): "no difference",
    (0, -1): "attention rises alone",
    (-1, 1): "accuracy rises, attention falls",
    (-1, 0): "accuracy rises, attention does not differ",
    (-1, -1): "accuracy and attention rise",
}
"""Of training on unpopular facts, against training on popular ones: by the signs of the two gaps, top − bottom."""


def values_of(found: xr.Dataset) -> pd.DataFrame:
    """Quantities of every replicate, arm and step of one way of fine-tuning.

    Args:
        found: what `finetune` returns, with `pretraining`.

    Returns:
        A row for each pre-training, replicate, arm and step: `accuracy`, `attention` and the shares of answers in
        `ERRORS` over the facts asked; `attention_low`, `…_middle`, `…_high`: to the subjects of the arm's training
        facts by tercile of salience; `recall` from (subject, relation) of all facts; `n_facts`, `n_asked`,
        `modal_share`. NaN for an arm without facts.
    """
    over = ("subject", "relation")
    asked, trained = found["asked"], found["trained"]
    parts = {"attention": found["attention"].where(asked).mean(over)}
    for number, kind in enumerate(ERRORS):
        parts["accuracy" if kind == "right" else kind] = (found["answer"] == number).where(asked).mean(over)
    own = found["salience"].where(trained)
    inner = [own.quantile(share, over).drop_vars("quantile") for share in (1 / 3, 2 / 3)]
    edges: list[Any] = [-np.inf, *inner, np.inf]
    for name, low, high in zip(TERCILES, edges, edges[1:], strict=False):
        parts[f"attention_{name}"] = found["attention"].where((own > low) & (own <= high)).mean(over)
    table = xr.Dataset(parts).where(found["n_facts"] > 0)
    table["recall"] = found["known"].mean(over)
    table["n_asked"] = asked.sum(over)
    table["n_facts"], table["modal_share"] = found["n_facts"], found["modal_share"]
    return table.to_dataframe().reset_index()


def percentiles_of(found: xr.Dataset) -> pd.DataFrame:
    """Accuracy over the facts asked of the most popular `share` of test subjects, at the last step (fig. 2a)."""
    last = found.isel(step=-1)
    right = (last["answer"] == 0).where(last["asked"])
    tested = last["asked"].any("relation")
    place = tested.cumsum("subject") / tested.sum("subject")
    parts = [right.where(place <= share + 1e-9).mean(("subject", "relation")) for share in SHARES]
    curve = xr.concat(parts, dim=xr.IndexVariable("share", list(SHARES))).where(last["n_facts"] > 0)
    return curve.rename("accuracy").drop_vars("step", errors="ignore").to_dataframe().reset_index()


def along_of(found: xr.Dataset) -> pd.DataFrame:
    """Accuracy and attention over all facts along a pre-training, by replicate (fig. 6)."""
    over = ("subject", "relation")
    parts = {"accuracy": (found["answer"] == 0).mean(over), "attention": found["attention"].mean(over)}
    return xr.Dataset(parts).to_dataframe().reset_index()


def means(table: pd.DataFrame, by: Sequence[str], of: Sequence[str]) -> pd.DataFrame:
    """Means over replicates with 95 % intervals of t: `mean`, `low`, `high`, `n` for each quantity in a row."""
    rows = []
    for key, group in table.groupby(list(by), sort=False, observed=True):
        for name in of:
            rows.append(dict(zip(by, key, strict=True)) | {"quantity": name, **interval(group[name])})
    return pd.DataFrame(rows)


def interval(values: Sequence[float] | pd.Series) -> dict[str, Any]:
    """Mean over replicates and its 95 % interval of t; NaN ends of fewer than two."""
    own = np.asarray(values, float)
    own = own[np.isfinite(own)]
    mean = float(own.mean()) if len(own) else float("nan")
    half = stats.t.ppf(0.975, len(own) - 1) * own.std(ddof=1) / len(own) ** 0.5 if len(own) > 1 else float("nan")
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": len(own)}


def gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Gaps between training on popular and on unpopular facts, top − bottom of the same replicate.

    Args:
        table: of `values_of`, all cells, with `world`, `zipf` and `finetuning`.

    Returns:
        A row for each cell and step: `accuracy` and `attention`, each with `_low`, `_high` (95 %, of t over
        replicates), `recall`, `n_facts`, `n`, and the `pattern` by the signs of the gaps whose intervals leave out 0.
    """
    wide = table[table["arm"].isin(("top", "bottom"))].pivot_table(
        index=[*CELL, "step", "replicate"], columns="arm", values=["accuracy", "attention"], observed=True
    )
    rows = []
    for key, group in wide.groupby(level=[*CELL, "step"], sort=False):
        row: dict[str, Any] = dict(zip((*CELL, "step"), key, strict=True))
        signs = []
        for name in ("accuracy", "attention"):
            found = interval(group[name]["top"] - group[name]["bottom"])
            row |= {name: found["mean"], f"{name}_low": found["low"], f"{name}_high": found["high"], "n": found["n"]}
            signs.append(1 if found["low"] > 0 else -1 if found["high"] < 0 else 0)
        rows.append(row | {"pattern": PATTERNS[signs[0], signs[1]]})
    rows.sort(key=lambda row: [list(table[name].unique()).index(row[name]) for name in ("world", "finetuning")])
    about = table[table["arm"] == "top"].groupby([*CELL, "step"], observed=True)[["recall", "n_facts"]].mean()
    return pd.DataFrame(rows).merge(about.reset_index(), how="left", on=[*CELL, "step"])
