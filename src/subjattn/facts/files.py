"""A user's own table, from a file or a DataFrame, and where each of its rows stands, so that messages can name it.

A .csv whose header holds no comma, but semicolons or tabs, is read as parted by these, and that is said once: a table
of one column could hold no facts, so there is nothing else that it could mean. The same goes for a .tsv without tabs.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.names import broken, visible
from subjattn.facts.table import KeyTwice, csv_rows, json_of, read_text


log = logging.getLogger(__name__)

SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FRAME = "DataFrame"
"""What a table that comes from no file is called."""
_ESCAPED = re.compile(r"\\u[dD][89a-fA-F]")
_STATED = re.compile(r"\s*\"?sep *= *([^\w\s\"]|\t)\"?[,;\t ]*(?:\r\n|\r|\n|\Z)", re.IGNORECASE)
"""A first line by which Excel is told what parts the cells: `sep=;`."""
_NAMED = {",": "commas", ";": "semicolons", "\t": "tabs"}


@dataclass(frozen=True)
class Table:
    """Cells as a file has them, of CSV and TSV as text.

    Attributes:
        cells: one row each.
        source: the file, or `DataFrame`.
        places: of each row its line in the file, counted from 1, or its label.
        lines: whether places are lines.
        header: where the columns are named, as messages begin.
    """

    cells: pd.DataFrame
    source: str
    places: list[Any]
    lines: bool
    header: str

    def at(self, place: Any) -> str:
        """A place as messages begin: `facts.csv:7`, or `DataFrame: row 7`."""
        return f"{self.source}:{place}" if self.lines else f"{self.source}: row {place}"

    def named(self, place: Any) -> str:
        """A place within the table in words."""
        return f"{'line' if self.lines else 'row'} {place}"


def read_table(source: Path | pd.DataFrame) -> Table:
    """A table as it is.

    Raises:
        BadInput: no such file, an empty one, or one that is not what its name says; the message names the line.
    """
    if isinstance(source, pd.DataFrame):
        return Table(_named_once(source.rename(columns=str), FRAME), FRAME, _labels(source), False, FRAME)
    if not source.is_file():
        raise BadInput(f"no such file of facts: {str(source)!r}")
    suffix = source.suffix.lower()
    if suffix == ".parquet":
        cells = read_parquet(source)
        return Table(cells, str(source), _labels(cells), False, str(source))
    text = read_text(source)
    if not text.strip():
        raise BadInput(f"{source}: the file is empty: write {_EXAMPLES[suffix == '.jsonl']}")
    read: Callable[[Path, str], Table] = _json_lines if suffix == ".jsonl" else _separated
    return read(source, text)


_EXAMPLES = (
    "a header such as 'subject,answer', and a line for each fact",
    'a line such as {"subject": "France", "answer": "Paris"} for each fact',
)


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file's table; BadInput where it is none."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError, ImportError) as error:  # what pyarrow raises are ValueErrors and OSErrors
        raise BadInput(f"{path}: cannot be read as parquet: {str(error).splitlines()[0][:200]}") from None


def _labels(cells: pd.DataFrame) -> list[Any]:
    """Labels of rows; their numbers where a label stands on several."""
    return cells.index.tolist() if cells.index.is_unique else list(range(len(cells)))


def _json_lines(path: Path, text: str) -> Table:
    rows, places = [], []
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            row = json_of(content)
        except KeyTwice as error:
            raise BadInput(f"{path}:{line}: {error}") from None
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}:{line}: cannot be read as JSON ({error}): write one object a line") from None
        if _ESCAPED.search(content) and (found := broken(json.dumps(row, ensure_ascii=False))):
            raise BadInput(f"{path}:{line}: holds {found}")
        if not isinstance(row, dict):
            raise BadInput(f"{path}:{line}: is no object: write {_EXAMPLES[1]}")
        rows.append(row)
        places.append(line)
    return Table(pd.DataFrame(rows, dtype=object), str(path), places, True, str(path))


def _separated(path: Path, text: str) -> Table:
    start = 1
    if stated := _STATED.match(text):
        text, start = text[stated.end() :], 2
    if not text.strip():
        raise BadInput(f"{path}: holds nothing but its first line: write {_EXAMPLES[0]}")
    delimiter = stated[1] if stated else _delimiter(path, text)
    rows = csv_rows(path, text, delimiter, start, spaces=False)
    first, header = next(rows)
    names = [visible(name).strip() for name in header]
    cells, places = [], []
    for line, row in rows:
        if len(row) != len(names):
            raise BadInput(
                f"{path}:{line}: {len(row)} cells, and the header has {len(names)}: put a cell that holds "
                "the separator in quotes"
            )
        cells.append(row)
        places.append(line)
    table, where = pd.DataFrame(cells, columns=names, dtype=object), f"{path}:{first}"
    return Table(_named_once(table, where), str(path), places, True, where)


def _named_once(cells: pd.DataFrame, where: str) -> pd.DataFrame:
    if (twice := cells.columns[cells.columns.duplicated()]).size:
        raise BadInput(f"{where}: two columns have the same name, {twice[0]!r}: rename one")
    return cells


def _delimiter(path: Path, text: str) -> str:
    usual = "\t" if path.suffix.lower() == ".tsv" else ","
    header = next(line for line in text.splitlines() if line.strip())
    if usual in header:
        return usual
    others = [one for one in _NAMED if one in header]
    if len(others) != 1:
        return usual
    _say_once(f"note: {path} is read as parted by {_NAMED[others[0]]}: its header holds no {_NAMED[usual]}")
    return others[0]


@cache
def _say_once(what: str) -> None:
    log.warning("%s", what)
