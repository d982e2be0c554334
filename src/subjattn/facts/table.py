"""The table every source gives, checked; and facts from a user's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from subjattn.errors import BadInput


COLUMNS = ["fact_id", "subject", "relation", "answers", "popularity", "source"]

READERS: Mapping[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8"),
    ".tsv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", sep="\t"),
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
    ".parquet": pd.read_parquet,
}


def load(path: Path) -> pd.DataFrame:
    """Facts from a file with columns `subject` and `answer` (or `answers`); see `load_facts`."""
    if not path.is_file():
        raise BadInput(f"no such file of facts: {str(path)!r}")
    try:
        raw = READERS[path.suffix.lower()](path)
    except (ValueError, OSError) as error:
        raise BadInput(f"{path}: cannot be read as {path.suffix[1:]}: {str(error).splitlines()[0]}") from None
    answer_column = next((name for name in ("answers", "answer") if name in raw), None)
    if "subject" not in raw or answer_column is None:
        raise BadInput(
            f"{path}: needs the columns 'subject' and 'answer' (or 'answers'), has {', '.join(map(str, raw))}"
        )
    popularity = raw["popularity"] if "popularity" in raw else pd.Series(float("nan"), index=raw.index)
    facts = pd.DataFrame(
        {
            "fact_id": raw["fact_id"].astype(str)
            if "fact_id" in raw
            else [f"{path.stem}-{i}" for i in range(len(raw))],
            "subject": raw["subject"],
            "relation": raw["relation"] if "relation" in raw else "unnamed",
            "answers": [_answers(value) for value in raw[answer_column]],
            "popularity": _popularity(popularity, path),
            "source": str(path),
        }
    )
    return check(facts)


def check(facts: pd.DataFrame) -> pd.DataFrame:
    """The table itself, if every row can be asked; BadInput naming the first row that cannot."""
    missing = [name for name in COLUMNS if name not in facts]
    if missing:
        raise BadInput(f"facts lack the columns {', '.join(missing)}")
    if facts.empty:
        raise BadInput("there are no facts in the table")
    for row, (subject, answers) in enumerate(zip(facts["subject"], facts["answers"], strict=True)):
        if not isinstance(subject, str) or not subject.strip():
            raise BadInput(f"fact {facts['fact_id'].iloc[row]} (row {row}) has no subject")
        if not answers or not all(isinstance(a, str) and any(map(str.isalnum, a)) for a in answers):
            raise BadInput(f"fact {facts['fact_id'].iloc[row]} (row {row}) has no answer, or an empty one")
    repeated = facts["fact_id"][facts["fact_id"].duplicated()]
    if len(repeated):
        raise BadInput(f"fact_id {repeated.iloc[0]!r} occurs more than once")
    return facts[COLUMNS].reset_index(drop=True)


def _answers(value: object) -> list[str]:
    """Accepted answers of a cell: text parted by `|`, a list, or a number; none for a missing value."""
    if isinstance(value, str):
        return [part.strip() for part in value.split("|")]
    if isinstance(value, list | np.ndarray):
        return list(value)
    return [str(value)] if isinstance(value, int) else []


def _popularity(values: pd.Series, path: Path) -> pd.Series:
    present = values.notna() & (values.astype(str).str.strip() != "")
    numbers = pd.to_numeric(values.where(present), errors="coerce").astype(float)
    wrong = values[present & numbers.isna()]
    if len(wrong):
        raise BadInput(f"{path}: popularity {wrong.iloc[0]!r} in row {wrong.index[0]} is not a number")
    return numbers
