"""Facts by name whose answer turned between two arms, right to wrong or wrong to right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd
import xarray as xr

from subjattn.study.config import StudyConfig
from subjattn.study.terms import Terms


def flips(config: StudyConfig, terms: Terms) -> Iterator[dict[str, Any]]:
    """For every contrast of two single models, in every style: facts `lost` and `won` by the first of them.

    Yields:
        `style`, `arm_a`, `arm_b`, `n_facts`, and two lists of facts, each with what it is, what is right (`answer`),
        and what either arm answered (under `arm_a`, `arm_b`).
    """
    about = terms.facts.set_index("fact_id")[["subject", "relation", "answer"]]
    for style in config.styles:
        for a, b in config.contrasts:
            after, before = (_answers([*terms.datasets(arm, style, "accuracy").values()]) for arm in (a, b))
            if after is None or before is None:
                continue
            both = after.add_suffix("_a").join(before.add_suffix("_b")).join(about)
            turned = both[both["right_a"] != both["right_b"]].rename(columns={"said_a": "arm_a", "said_b": "arm_b"})
            columns = ["fact_id", *about, "arm_b", "arm_a"]
            rows = {
                name: turned[turned["right_a"] == won].reset_index(names="fact_id")[columns].to_dict("records")
                for name, won in (("lost", False), ("won", True))
            }
            yield {"style": style, "arm_a": a, "arm_b": b, "n_facts": len(both), **rows}


def _answers(replicates: list[xr.Dataset]) -> pd.DataFrame | None:
    """What a single model answered, by fact, and whether that is right; None of an arm with replicates."""
    if len(replicates) != 1:
        return None
    found = replicates[0]
    index = pd.Index(found["fact"].values, name="fact_id")
    return pd.DataFrame({"said": found["prediction"].values, "right": found["accuracy"].values == 1}, index)
