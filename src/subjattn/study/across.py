"""What a tuned arm and its base give each other, for the summary: states put back, and parts of the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import xarray as xr

from subjattn.evidence.returned import accuracy_in_rows, in_rows, returned_accuracy, shares
from subjattn.study.config import StudyConfig
from subjattn.study.files import Replicate
from subjattn.study.terms import Terms


def across(config: StudyConfig, terms: Terms, arms: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each style and tuned arm with a measure that compares it with its base.

    `put` holds what is returned when the base's states of all layers are put back, place by place, over facts and
    replicates; `parts` and `gap` the mean, `low` and `high` of the update's parts and of the gap; `answers` how many
    answers return.
    """
    for style in config.styles:
        for arm in filter(config.is_tuned, config.arms):
            if style not in config.styles_of(arm):
                continue
            found = arms[arm]["styles"][style]
            parts = {name.partition(".")[2]: _mean(found, name) for name in found if name.startswith("update_share.")}
            own = [of["transfer"] for of in _measured(config, terms, arm, style, "transfer").values()]
            answers = _measured(config, terms, arm, style, "transfer_accuracy")
            if not parts and not own and not answers:
                continue
            row: dict[str, Any] = {"arm": arm, "style": style, "parts": parts}
            if own:
                cells = shares(_mean_of_replicates(own))
                row |= {"gap": _mean(found, "tuning_gap"), "put": in_rows(cells, "put"), "n": own[0].sizes["fact"]}
            if answers:
                row["answers"] = accuracy_in_rows(returned_accuracy(_replicated(answers, terms.facts)))
            yield row


def _measured(
    config: StudyConfig, terms: Terms, arm: str, style: str, measure: str
) -> dict[Replicate | None, xr.Dataset]:
    return terms.datasets(arm, style, measure) if measure in config.measures else {}


def _replicated(found: Mapping[Replicate | None, xr.Dataset], facts: pd.DataFrame) -> xr.DataArray:
    """Right answers of all replicates, with what says which facts belong together."""
    relations = facts.set_index("fact_id")["relation"]
    arrays = [
        of["correct"] if replicate is None else of["correct"].expand_dims(draw=[replicate[0]], seed=[replicate[1]])
        for replicate, of in found.items()
    ]
    correct = arrays[0] if len(arrays) == 1 else xr.combine_by_coords(arrays)["correct"]  # type: ignore[index]
    about = relations.reindex(correct["fact"].values).to_numpy(object)
    return correct.assign_coords(relation=("fact", about))  # type: ignore[no-any-return]


def _mean_of_replicates(arrays: list[xr.DataArray]) -> xr.DataArray:
    """Each fact's mean over replicates: a fact that is asked of five draws is one fact."""
    return xr.concat(arrays, "replicate").mean("replicate", keep_attrs=True)


def _mean(found: Mapping[str, Any], name: str) -> dict[str, float | None]:
    low, high = found["intervals"].get(name) or (None, None)
    return {"mean": found.get(name), "low": low, "high": high}
