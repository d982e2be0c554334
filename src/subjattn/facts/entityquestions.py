"""EntityQuestions (Sciavolino et al. 2021): 220,703 questions in 24 Wikidata relations, subjects by template.

Reads the published folder (`train`, `dev`, `test` of `P17.train.json` …), one of its parts or one file.
Popularity is not part of it: see `join_popularity`.
"""

from __future__ import annotations

import re
from pathlib import Path

from subjattn.errors import BadInput
from subjattn.facts.table import Read, Reader, read_json, subject_of
from subjattn.facts.templates import TEMPLATES


_FILE = re.compile(r"(P\d+)\.(train|dev|test)\.json")


def read(path: Path) -> Read:
    """Facts of every relation's file under a folder, or of one file."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("P*.json") if _FILE.fullmatch(file.name))
    if not files:
        raise BadInput(f"{path} holds no EntityQuestions: files named as P17.train.json")
    reader = Reader("EntityQuestions")
    for file in files:
        _read_file(file, reader)
    return reader.read()


def _read_file(file: Path, reader: Reader) -> None:
    name = _FILE.fullmatch(file.name)
    if name is None or name[1] not in TEMPLATES:
        raise BadInput(f"{file} is not named after a relation of EntityQuestions, as P17.train.json is")
    relation, part = name.groups()
    template, rows = TEMPLATES[relation]["question"], read_json(file)
    if not isinstance(rows, list):
        raise BadInput(f"{file} is not a list of questions")
    for row, item in enumerate(rows):
        question = item.get("question") if isinstance(item, dict) else None
        if not isinstance(question, str):
            reader.reject(str(file), row, "there is no question")
        elif (subject := subject_of(question, template)) is None:
            reader.reject(str(file), row, f"{question[:80]!r} is not of the template {template!r}")
        else:
            reader.add(str(file), row, f"{relation}-{part}-{row}", subject, relation, template, item.get("answers"))
