"""MMLU (Hendrycks et al. 2021): multiple choice in 57 subjects; no name to attend to, so no subject.

Reads the published CSV (`SUBJECT_test.csv`, answers A–D, or with a header and answers 0–3) and the hub's parquet.
"""

from __future__ import annotations

import re
from pathlib import Path

from subjattn.errors import BadInput
from subjattn.facts.files import read_parquet
from subjattn.facts.table import Read, Reader, escaped, read_csv


HUB = ("cais/mmlu", "all/test-00000-of-00001.parquet")
HISTORY = ("high_school_european_history", "high_school_us_history", "high_school_world_history", "prehistory")
"""The subjects of MMLU's own category `history`; Ghosal et al. 2024 do not say which of them they took."""
LETTERS = "ABCD"
_FILE = re.compile(r"(\w+)_(dev|val|test)\.csv")
_HEADER = ["question", "choice0", "choice1", "choice2", "choice3", "answer"]


def read(path: Path) -> Read:
    """Facts of every file under a folder, or of one file."""
    pattern = "*.csv"
    files = [path] if path.is_file() else sorted(file for file in path.rglob(pattern) if _FILE.fullmatch(file.name))
    if not files:
        raise BadInput(f"{path} holds no MMLU: files named as anatomy_test.csv")
    reader = Reader("MMLU")
    for file in files:
        if file.suffix == ".parquet":
            _read_parquet(file, reader)
        else:
            _read_csv(file, reader)
    return reader.read()


def read_history(path: Path) -> Read:
    """Facts of the history subjects alone."""
    facts, rejected = read(path)
    return Read(facts[facts["relation"].isin(HISTORY)].reset_index(drop=True), rejected)


def _read_csv(file: Path, reader: Reader) -> None:
    name = _FILE.fullmatch(file.name)
    if name is None:
        raise BadInput(f"{file} is not named after a subject of MMLU, as anatomy_test.csv is")
    subject, part = name.groups()
    rows = read_csv(file)
    for row, cells in enumerate(rows[1:] if rows[:1] == [_HEADER] else rows):
        if len(cells) != len(_HEADER):
            reader.reject(str(file), row, f"{len(cells)} cells instead of {len(_HEADER)}")
        else:
            _add(reader, str(file), row, f"mmlu-{part}-{subject}-{row}", subject, cells[0], cells[1:5], cells[5])


def _read_parquet(file: Path, reader: Reader) -> None:
    table = read_parquet(file)
    if missing := [name for name in ("question", "subject", "choices", "answer") if name not in table]:
        raise BadInput(f"{file}: lacks the column {missing[0]!r}; it has {', '.join(map(str, table))[:200]}")
    part = file.name.partition("-")[0]
    for row, item in enumerate(table.to_dict("records")):
        choices, answer = (
            [str(choice) for choice in (item["choices"] if item["choices"] is not None else ())],
            str(item["answer"]),
        )
        subject = str(item["subject"])
        _add(reader, str(file), row, f"mmlu-{part}-{row}", subject, str(item["question"]), choices, answer)


def _add(
    reader: Reader, file: str, row: int, fact_id: str, relation: str, stem: str, choices: list[str], answer: str
) -> None:
    letter = (
        answer.strip()
        if answer.strip() in tuple(LETTERS)
        else dict(zip("0123", LETTERS, strict=True)).get(answer.strip())
    )
    if not letter:
        reader.reject(file, row, f"the answer {answer[:80]!r} is neither a letter A–D nor a number 0–3")
    elif not stem.strip():
        reader.reject(file, row, "there is no question")
    elif len(choices) != len(LETTERS):
        reader.reject(file, row, f"{len(choices)} choices instead of {len(LETTERS)}")
    else:
        reader.add(file, row, fact_id, None, relation, escaped(stem.strip()), [letter], choices=choices)
