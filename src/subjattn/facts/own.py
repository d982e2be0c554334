"""Facts from a user's own CSV, TSV, JSONL or parquet file, or a DataFrame, under whatever column names."""

from __future__ import annotations

import ast
import io
import logging
import re
import tokenize
from collections.abc import Mapping
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.files import FRAME, SUFFIXES, Table, read_table
from subjattn.facts.names import broken
from subjattn.facts.table import COLUMNS, Read, Reader, Rejected, json_of, placed


log = logging.getLogger(__name__)

OURS = ("answer", "third", "test", "validation", "demonstration", "out_of_distribution", "n_tokens", "_rank", "_size")
"""Columns that a split adds to facts."""
FIELDS = ("fact_id", "subject", "relation", "question", "answer", "popularity")


class UnnamedColumns(BadInput):
    """A table whose columns have other names; the message says how to name them in Python.

    Attributes:
        what: what is missing.
        guesses: the table's name for each field that is missing.
    """

    def __init__(self, what: str, guesses: Mapping[str, str]) -> None:
        super().__init__(f"{what}: name the columns, columns={dict(guesses)}")
        self.what, self.guesses = what, dict(guesses)

    def __reduce__(self) -> tuple[type, tuple[str, dict[str, str]]]:
        return type(self), (self.what, self.guesses)

    def in_shell(self) -> str:
        """The message for the command line."""
        return f"{self.what}: name the columns, --columns {','.join(map('='.join, self.guesses.items()))}"

    def in_study(self) -> str:
        """The message for a study's file."""
        named = ", ".join(map(": ".join, self.guesses.items()))
        return f"{self.what}: name the columns, facts.columns: {{{named}}}"


def read(source: Path | pd.DataFrame, columns: Mapping[str, str] | None = None) -> tuple[Read, dict[str, tuple]]:
    """Facts of a table with `subject` and `answer` (a list, or text parted by `|`), and maybe the other FIELDS.

    Args:
        source: a file, or a DataFrame.
        columns: the table's name for any of FIELDS, such as ``{"subject": "name"}``.

    Returns:
        The facts, the table's other columns beside them, and by fact id the source, the place of its row, and that
        place in words.

    Raises:
        BadInput: the file cannot be read, a column is missing, or a row cannot be a fact: the table is the user's
            and can be mended, so the first wrong row ends the reading.
    """
    table = read_table(source)
    names = _columns(table, dict(columns or {}))
    if table.cells.empty:
        raise BadInput(f"{table.header}: there are no facts below the header: write a row for each")
    reader, places = Reader(table.source, "line" if table.lines else "row"), {}
    stem = "row" if isinstance(source, pd.DataFrame) else source.stem
    numbers = table.places if isinstance(source, pd.DataFrame) else range(len(table.cells))
    for number, place, cells in zip(numbers, table.places, table.cells.to_dict("records"), strict=True):
        given = {field: _text(cells.get(name)) for field, name in names.items()}
        try:
            given["subject"] = reader.clean(_subject(given["subject"]), place, name=True)
            question = _question(reader.clean(given["question"], place), given["subject"])
            answers = _answers(given["answer"])
        except Rejected as reason:
            raise BadInput(f"{table.at(place)}: {reason}") from None
        fact_id = f"{stem}-{number}" if _missing(given["fact_id"]) else str(given["fact_id"])
        reader.add(
            table.source,
            place,
            fact_id,
            None if _missing(given["subject"]) else given["subject"],
            (question or "unnamed") if _missing(given["relation"]) else str(given["relation"]),
            question,
            answers,
            popularity=None if _missing(given["popularity"]) else given["popularity"],
        )
        if reader.rejected:
            raise BadInput(f"{table.at(place)}: {reader.rejected[0][2]}")
        places[fact_id] = (table.source, place, table.named(place))
    facts, rejected = reader.read()
    return Read(_with_others(facts, table, names), rejected), places


def is_own(facts: pd.DataFrame) -> bool:
    """Whether facts are from a user's own table, so that its columns are what the user wants asked."""
    return all(source == FRAME or Path(source).suffix.lower() in SUFFIXES for source in facts["source"].unique())


def _with_others(facts: pd.DataFrame, table: Table, names: Mapping[str, str]) -> pd.DataFrame:
    """Facts beside the table's other columns; those that have a name of ours are left out, and it is said."""
    others = [name for name in table.cells if name not in names.values()]
    ours = [str(name) for name in others if name in (*OURS, *COLUMNS) or str(name).startswith("train_")]
    if ours:
        said = "note: %s: the columns %s are left out, for subjattn has its own of these names"
        log.warning(said, table.source, ", ".join(ours))
    cells = table.cells[[name for name in others if str(name) not in ours]]
    for name, column in cells.items():
        for place, cell in zip(table.places, column, strict=True):
            if isinstance(cell, str) and any("\ud800" <= char <= "\udfff" for char in cell):
                raise BadInput(f"{table.source}:{place}: the column {str(name)!r} holds {broken(cell)}")
    cells = cells.map(lambda cell: None if isinstance(cell, str) and not cell else cell)
    return pd.concat([facts, cells.set_axis(facts.index)], axis=1)


def _columns(table: Table, columns: dict[str, str]) -> dict[str, str]:
    """The table's column for each of FIELDS; those that are needed, or named, are there."""
    if unknown := [field for field in columns if field not in FIELDS]:
        turned = columns[unknown[0]] in FIELDS
        hint = f": turn it round, {columns[unknown[0]]}={unknown[0]}" if turned else ""
        raise BadInput(f"columns maps {unknown[0]!r}, which is none of {', '.join(FIELDS)}{hint}")
    there = [str(name) for name in table.cells]
    if wrong := [name for name in there if broken(name)]:
        raise BadInput(f"{table.header}: the column {wrong[0][:80]!r} holds {broken(wrong[0])}")
    names = {field: field for field in FIELDS} | columns
    if "answer" not in columns and "answer" not in there and "answers" in there:
        names["answer"] = "answers"
    missing = [field for field in dict.fromkeys(["subject", "answer", *columns]) if names[field] not in there]
    if missing:
        alike = {name.strip().casefold(): name for name in there}
        guesses = {field: alike.get(names[field].casefold(), "COLUMN") for field in missing}
        raise UnnamedColumns(f"{table.header}: no column {names[missing[0]]!r} among {', '.join(there)[:200]}", guesses)
    return names


def _question(question: Any, subject: Any) -> str | None:
    if _missing(question):
        return None
    text = str(question).rstrip()
    return text if "{subject}" in text or not isinstance(subject, str) else placed(text, subject)


def _subject(value: object) -> object:
    if isinstance(value, str) and _listed(value) is not None:
        raise Rejected(f"the subject {value[:80]!r} is a list: give one name a row")
    return _unquoted(value)


def _answers(value: object) -> list[Any]:
    """Accepted answers of a cell: a list, also one written as text, or text parted by `|`; none for a missing value."""
    if isinstance(value, str):
        listed = _listed(value)
        if listed is None and (_BRACKETS.fullmatch(value.strip()) or _TUPLE.match(value.strip())):
            raise Rejected(
                f"the answer {value[:80]!r} looks like a list and cannot be read as one: write "
                '["one", "another"] or one|another, and ["[one]"] where the brackets belong to it'
            )
        if listed is None:
            parts = [str(_unquoted(part)).strip() for part in value.split("|")]
            return parts if len(parts) < 2 else [one for part in parts for one in _answers(part)]
        return listed
    if isinstance(value, list | tuple | np.ndarray):
        return [_text(one) for one in value]
    return [] if _missing(value) or isinstance(value, dict) else [value]


_BRACKETS = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)
_TUPLE = re.compile(r"\(\s*['\"]|(?:array|set|frozenset|list|tuple|Index)\(")


def _listed(value: str) -> list[Any] | None:
    """The items of a list written as text, as JSON or as Python does; None where it is none."""
    text = value.strip()
    if not (_BRACKETS.fullmatch(text) or _TUPLE.match(text)):
        return None
    try:
        found = json_of(text)
    except (ValueError, RecursionError):
        try:
            found = ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return None
        if isinstance(found, list | tuple) and len(found) != _n_strings(text):
            return None  # strings side by side, as NumPy writes them, are one to Python
    flat = isinstance(found, list | tuple) and all(isinstance(one, str | int) for one in found)
    return [_text(one) for one in found] if flat else None


def _n_strings(text: str) -> int:
    """Literals in a list of Python, strings side by side counted apart."""
    kinds = (tokenize.STRING, tokenize.NUMBER, tokenize.NAME)
    return sum(token.type in kinds for token in tokenize.generate_tokens(io.StringIO(text).readline))


def _unquoted(value: Any) -> Any:
    """A cell, unless its quotes belong to the file: white space other than spaces stands before them."""
    if isinstance(value, str) and value.lstrip() != value and value.lstrip().startswith('"'):
        raise Rejected(f"the cell {value[:80]!r} has white space before its quote: take it out")
    return value


def _text(value: Any) -> Any:
    """A whole number as text, such as a year that is an answer; anything else as it is."""
    return str(value) if isinstance(value, Integral) and not isinstance(value, bool) else value


def _missing(value: object) -> bool:
    empty = value is None or value is pd.NA or value is pd.NaT
    return empty or (isinstance(value, float) and np.isnan(value)) or (isinstance(value, str) and not value)
