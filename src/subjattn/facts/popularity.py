"""Popularity from another table, for facts whose source has none (EntityQuestions)."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.own import read_table


def join_popularity(
    facts: pd.DataFrame, path: str | Path, subject: str = "subject", popularity: str = "popularity"
) -> pd.DataFrame:
    """The facts with the popularity that a table gives their subjects, NaN for those it does not name.

    Names are compared but for case and spaces. A name with several popularities in the table is no name we can
    rank by, and counts as not given.

    Args:
        facts: a table of facts.
        path: a CSV, TSV, JSONL or parquet file.
        subject, popularity: its columns.

    Raises:
        BadInput: no such file or column, a popularity that is no number, or none of the subjects in the table.
    """
    table = read_table(Path(path))
    for name in (subject, popularity):
        if name not in table:
            raise BadInput(f"{path}: has no column {name!r}; it has {', '.join(map(str, table))[:200]}")
    text = table[popularity].astype(str).str.strip()
    values = pd.to_numeric(text.where(~text.isin(["", "nan", "None"])), errors="coerce")
    wrong = text[values.isna() & ~text.isin(["", "nan", "None"])]
    if len(wrong):
        raise BadInput(f"{path}: popularity {wrong.iloc[0]!r} in row {wrong.index[0]} is not a number")
    named = pd.DataFrame({"name": _plain(table[subject].astype(str)), "value": values}).dropna().drop_duplicates()
    lookup = named[~named["name"].duplicated(keep=False)].set_index("name")["value"]
    joined = _plain(facts["subject"]).map(lookup).astype(float)
    if joined.isna().all():
        raise BadInput(f"{path} names none of the {len(facts)} subjects in its column {subject!r}")
    return facts.assign(popularity=joined)


def _plain(names: pd.Series) -> pd.Series:
    return names.str.casefold().str.split().str.join(" ")
