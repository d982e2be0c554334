"""Popularity from another table, for facts whose source has none (EntityQuestions)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.files import read_table
from subjattn.facts.names import plain_name
from subjattn.facts.table import Rejected, popularity_of


def join_popularity(
    facts: pd.DataFrame, path: str | Path, subject: str = "subject", popularity: str = "popularity"
) -> pd.DataFrame:
    """The facts with the popularity that a table gives their subjects, NaN for those it does not name.

    Names are compared but for case, spaces and normal forms. A name with several popularities in the table is no
    name we can rank by, and counts as not given.

    Args:
        facts: a table of facts.
        path: a CSV, TSV, JSONL or parquet file.
        subject, popularity: its columns.

    Raises:
        BadInput: no such file or column, a popularity that is no number, or none of the subjects in the table.
    """
    table = read_table(Path(path))
    for name in (subject, popularity):
        if name not in table.cells:
            raise BadInput(f"{table.header}: no column {name!r} among {', '.join(map(str, table.cells))[:200]}")
    values = []
    for place, value in zip(table.places, table.cells[popularity].tolist(), strict=True):
        try:
            values.append(popularity_of(value))
        except Rejected as reason:
            raise BadInput(f"{table.at(place)}: {reason}") from None
    named = (
        pd.DataFrame({"name": [plain_name(str(name)) for name in table.cells[subject]], "value": values})
        .dropna()
        .drop_duplicates()
    )
    lookup = named[~named["name"].duplicated(keep=False)].set_index("name")["value"]
    joined = facts["subject"].map(plain_name, na_action="ignore").map(lookup).astype(float)
    if joined.isna().all():
        raise BadInput(f"{path} names none of the {len(facts)} subjects in its column {subject!r}")
    return facts.assign(popularity=joined)
