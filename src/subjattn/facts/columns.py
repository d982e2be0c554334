"""A column of a table of facts by fact id: one of those that every table has, or of the user's own file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts import own
from subjattn.facts.files import SUFFIXES, read_table


def column_of(
    facts: pd.DataFrame, name: str, source: str | Path | pd.DataFrame, columns: Mapping[str, str] | None = None
) -> pd.Series:
    """The cells of a column, by fact id.

    Args:
        facts: as `load_facts` gives them.
        name: of a column of theirs with one value a fact, such as `relation`; else of the table they were read from.
        source, columns: as `load_facts` took them.

    Raises:
        BadInput: no such column.
    """
    given = facts.set_index("fact_id")
    plain = [str(one) for one in given if one not in ("answers", "choices")]
    if name in plain:
        return given[name]
    if not isinstance(source, pd.DataFrame) and Path(source).suffix.lower() not in SUFFIXES:
        raise BadInput(f"{str(source)!r} has no column {name!r}: there are {', '.join(plain)}")
    table = read_table(source if isinstance(source, pd.DataFrame) else Path(source))
    if name not in table.cells:
        there = ", ".join(dict.fromkeys([*plain, *map(str, table.cells)]))
        raise BadInput(f"{table.header}: no column {name!r}; there are {there[:300]}")
    _, places = own.read(source if isinstance(source, pd.DataFrame) else Path(source), columns)
    cells = dict(zip(table.places, table.cells[name].tolist(), strict=True))
    found = pd.Series({fact: cells[place] for fact, (_, place, _) in places.items()}, dtype=object, name=name)
    return found.where(found.notna() & (found != "")).reindex(given.index)
