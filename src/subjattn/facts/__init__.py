"""Tables of facts: one pandas row per fact, the same columns whatever the source.

| column | meaning |
|---|---|
| fact_id | unique within its source |
| subject | the name asked about, verbatim as it appears in prompts |
| relation | what is asked of it; its templates are found by this name |
| answers | accepted answers, the one to be scored first |
| popularity | how well known the subject is (unit by source: people, page views); NaN if unknown |
| source | where the row came from |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import cities, table


SOURCES: Mapping[str, Callable[[], pd.DataFrame]] = {"cities": cities.load}


def load_facts(name: str, n: int | None = None, seed: int = 0) -> pd.DataFrame:
    """Facts of a built-in source (`cities`) or of the user's own CSV, TSV, JSONL or parquet file.

    Args:
        name: a source's name or a path. A file needs the columns `subject` and `answer` (or `answers`,
            separated by `|`); `fact_id`, `relation` and `popularity` are optional.
        n: draw this many facts at random; None for all.
        seed: of the draw, which depends on fact ids and not on the order of rows; without a column
            `fact_id` a file's row numbers are its ids.

    Raises:
        BadInput: unknown source, unreadable file or row, or `n` larger than the data.
    """
    if name in SOURCES:
        facts = SOURCES[name]()
    elif Path(name).suffix.lower() in table.READERS:
        facts = table.load(Path(name))
    else:
        known = ", ".join([*SOURCES, *(f"*{suffix}" for suffix in table.READERS)])
        raise BadInput(f"unknown facts {name!r}: use one of {known}")
    return facts if n is None else draw(facts, n, seed)


def draw(facts: pd.DataFrame, n: int, seed: int = 0) -> pd.DataFrame:
    """`n` facts at random; the draw depends on fact ids and not on the order of rows."""
    if not 1 <= n <= len(facts):
        raise BadInput(f"n={n} is not between 1 and the {len(facts)} facts there are")
    rng = np.random.default_rng(seed)
    ordered = facts.sort_values("fact_id", ignore_index=True)
    return ordered.iloc[np.sort(rng.choice(len(ordered), n, replace=False))].reset_index(drop=True)


__all__ = ["SOURCES", "draw", "load_facts"]
