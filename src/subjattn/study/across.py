"""What a tuned arm and its base give each other, for the summary: states put back, and parts of the update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import xarray as xr

from subjattn.evidence.returned import in_rows, shares
from subjattn.study.config import StudyConfig
from subjattn.study.terms import Terms


def across(config: StudyConfig, terms: Terms, arms: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each style and tuned arm with a measure that compares it with its base.

    `put` holds what is returned when the base's states of all layers are put back, place by place, over facts and
    replicates; `parts` and `gap` the mean, `low` and `high` of the update's parts and of the gap.
    """
    for style in config.styles:
        for arm in filter(config.is_tuned, config.arms):
            found = arms[arm]["styles"][style]
            parts = {name.partition(".")[2]: _mean(found, name) for name in found if name.startswith("update_share.")}
            measured = "transfer" in config.measures
            own = [of["transfer"] for of in terms.datasets(arm, style, "transfer").values()] if measured else []
            if not parts and not own:
                continue
            row: dict[str, Any] = {"arm": arm, "style": style, "parts": parts}
            if own:
                cells = shares(xr.concat(own, "fact"))
                row |= {"gap": _mean(found, "tuning_gap"), "put": in_rows(cells, "put"), "n": own[0].sizes["fact"]}
            yield row


def _mean(found: Mapping[str, Any], name: str) -> dict[str, float | None]:
    low, high = found["intervals"].get(name) or (None, None)
    return {"mean": found.get(name), "low": low, "high": high}
