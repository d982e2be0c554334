"""Facts from a user's own CSV, TSV, JSONL or parquet file, under whatever column names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.table import Read, Reader, Rejected, placed, read_csv, read_text


SUFFIXES = (".csv", ".tsv", ".jsonl", ".parquet")
FIELDS = ("fact_id", "subject", "relation", "question", "answer", "popularity")


def read(path: Path, columns: Mapping[str, str] | None = None) -> Read:
    """Facts of a file with `subject` and `answer` (several parted by `|`), and maybe the other FIELDS.

    Args:
        path: the file.
        columns: the file's name for any of FIELDS, such as ``{"subject": "name"}``.

    Raises:
        BadInput: the file cannot be read, a column is missing, or a row cannot be a fact: the file is the user's
            and can be mended, so the first wrong row ends the reading.
    """
    names = {field: field for field in FIELDS} | dict(columns or {})
    if unknown := [field for field in names if field not in FIELDS]:
        raise BadInput(f"columns maps {unknown[0]!r}, which is none of {', '.join(FIELDS)}")
    raw = read_table(path)
    if columns is None or "answer" not in columns:
        names["answer"] = "answers" if "answers" in raw else "answer"
    needed = ["subject", "answer", *(columns or {})]
    missing = [names[field] for field in needed if names[field] not in raw]
    if missing:
        raise BadInput(f"{path}: needs the columns 'subject' and 'answer', lacks {missing[0]!r}; it has {_joined(raw)}")
    reader = Reader(str(path))
    for row, cells in enumerate(raw.to_dict("records")):
        given = {field: _text(cells.get(name)) for field, name in names.items()}
        try:
            question = _question(given["question"], given["subject"])
        except Rejected as reason:
            raise BadInput(f"{path}: row {row}: {reason}") from None
        reader.add(
            str(path),
            row,
            f"{path.stem}-{row}" if _missing(given["fact_id"]) else str(given["fact_id"]),
            given["subject"],
            (question or "unnamed") if _missing(given["relation"]) else str(given["relation"]),
            question,
            _answers(given["answer"]),
            popularity=None if _missing(given["popularity"]) else given["popularity"],
        )
        if reader.rejected:
            raise BadInput(f"{path}: row {row}: {reader.rejected[0][2]}")
    if not reader.rows:
        raise BadInput(f"{path}: there are no facts in the file")
    return reader.read()


def read_table(path: Path) -> pd.DataFrame:
    """A table as the file has it, every cell of CSV and TSV as text."""
    if not path.is_file():
        raise BadInput(f"no such file of facts: {str(path)!r}")
    suffix = path.suffix.lower()
    try:
        if suffix == ".parquet":
            return read_parquet(path)
        if suffix == ".jsonl":
            rows = [json.loads(line) for line in read_text(path).split("\n") if line.strip()]
            if wrong := [number for number, row in enumerate(rows) if not isinstance(row, dict)]:
                raise BadInput(f"{path}: row {wrong[0]} is no mapping of columns")
            return pd.DataFrame(rows, dtype=object)
    except (ValueError, OSError) as error:
        if isinstance(error, BadInput):
            raise
        raise BadInput(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from None
    rows = read_csv(path, "\t" if suffix == ".tsv" else ",")
    if rows and len(set(rows[0])) < len(rows[0]):
        raise BadInput(f"{path}: two columns have the same name: {', '.join(rows[0])[:200]}")
    for number, cells in enumerate(rows[1:]):
        if len(cells) != len(rows[0]):
            raise BadInput(f"{path}: row {number}: {len(cells)} cells instead of {len(rows[0])}")
    return pd.DataFrame(rows[1:], columns=rows[0] if rows else [], dtype=object)


def read_parquet(path: Path) -> pd.DataFrame:
    """A parquet file's table; BadInput where it is none."""
    try:
        return pd.read_parquet(path)
    except (OSError, ValueError, ImportError) as error:  # what pyarrow raises are ValueErrors and OSErrors
        raise BadInput(f"{path}: cannot be read as parquet: {str(error).splitlines()[0][:200]}") from None


def _question(question: Any, subject: Any) -> str | None:
    if _missing(question):
        return None
    text = str(question).rstrip()
    return text if "{subject}" in text or not isinstance(subject, str) else placed(text, subject)


def _answers(value: object) -> list[Any]:
    """Accepted answers of a cell: text parted by `|`, or a list; none for a missing value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split("|")]
    if isinstance(value, list | np.ndarray):
        return [_text(one) for one in value]
    return [] if _missing(value) or isinstance(value, dict) else [value]


def _text(value: Any) -> Any:
    """A whole number as text, such as a year that is an answer; anything else as it is."""
    return str(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _missing(value: object) -> bool:
    return value is None or (isinstance(value, float) and np.isnan(value)) or (isinstance(value, str) and not value)


def _joined(raw: pd.DataFrame) -> str:
    return ", ".join(map(str, raw))[:200]
