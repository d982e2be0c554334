"""The table that every source gives: each row checked as it is read, and kept or listed with a reason."""

from __future__ import annotations

import codecs
import csv
import io
import json
import logging
import math
import re
import string
import sys
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.names import broken, spaced, taken_off, visible


log = logging.getLogger(__name__)

COLUMNS = ["fact_id", "subject", "relation", "question", "answers", "choices", "popularity", "source"]
REJECTED_COLUMNS = ["file", "row", "reason"]
LONGEST_NAME = 1000
"""Characters of a subject or an answer; more is a broken cell and no name."""
LONGEST_QUESTION = 20_000
_BREAKS = "\n\r\t\x0b\x0c\x85"
_LINE_END = re.compile(r"\r\n|\r|\n")


class Read(NamedTuple):
    """What a source holds: its facts, and every row of it that is not among them."""

    facts: pd.DataFrame
    rejected: pd.DataFrame
    """Columns `file`, `row` and `reason`.

    A row of a user's own file is its line, of a DataFrame its label; else it is counted from 0, a header apart.
    """


def check_table(facts: object, *columns: str) -> None:
    """Refuse what is no table of facts, such as a list of names.

    Args:
        facts: what was given.
        columns: that are needed; `answers` must hold lists.

    Raises:
        BadInput: no DataFrame, a column that is missing, or answers that are no lists.
    """
    how = "give what load_facts returns, such as load_facts(DataFrame({'subject': […], 'answer': […]}))"
    if not isinstance(facts, pd.DataFrame):
        raise BadInput(f"facts are a {type(facts).__name__} and no table of facts: {how}")
    if missing := [name for name in columns if name not in facts]:
        raise BadInput(f"the table of facts has no column {missing[0]!r}, it has {', '.join(map(str, facts))}: {how}")
    if "answers" in columns and any(isinstance(answers, str) for answers in facts["answers"]):
        raise BadInput(f"the column 'answers' of the table of facts holds text and no lists: {how}")
    if "answers" in columns:
        for fact_id, answers in zip(facts.get("fact_id", facts.index), facts["answers"], strict=True):
            listed = isinstance(answers, list | tuple | np.ndarray)
            if not listed or not len(answers) or not all(isinstance(one, str) and one.strip() for one in answers):
                raise BadInput(f"fact {fact_id}: its answers are {str(answers)[:80]}, and no texts in a list: {how}")
    if "subject" in columns:
        for fact_id, subject in zip(facts.get("fact_id", facts.index), facts["subject"], strict=True):
            if not (isinstance(subject, str) or subject is None or subject != subject):
                raise BadInput(f"fact {fact_id}: its subject is {str(subject)[:80]}, and no text: {how}")


class Rejected(Exception):
    """A row that cannot be a fact; the message says why."""


class Reader:
    """Collects rows of one source, refusing those that could become a wrong fact."""

    def __init__(self, source: str, place: str = "row") -> None:
        self.source, self.place = source, place
        self.rows: list[tuple[Any, ...]] = []
        self.rejected: list[tuple[str, int, str]] = []
        self._ids: set[str] = set()
        self._invisible: dict[str, object] = {}
        """Characters taken off, by name, and the first row that held each."""

    def add(
        self,
        file: str,
        row: int,
        fact_id: str,
        subject: object,
        relation: str,
        question: object,
        answers: object,
        *,
        choices: object = None,
        popularity: object = None,
    ) -> None:
        """Keep a row, or list it with the reason why it cannot be a fact.

        Args:
            file, row: where it stands.
            fact_id: unique within the source.
            subject: None only where there are choices.
            relation: what is asked.
            question: with `{subject}` in the subject's place and other braces doubled, or None.
            answers: accepted answers, the one to be scored first.
            choices: the texts of a multiple-choice question; the answer is then a letter.
            popularity: a number of at least 0, or None or "" where it is not known.
        """
        try:
            if fact_id in self._ids:
                raise Rejected(f"fact_id {fact_id[:80]!r} occurs more than once")
            _check_characters(fact_id, "fact_id")
            subject, question = self.clean(subject, row, name=True), self.clean(question, row)
            if isinstance(answers, Sequence) and not isinstance(answers, str):
                answers = [self.clean(answer, row, name=True) for answer in answers]
            options = None if choices is None else _texts(choices, "choice", LONGEST_QUESTION)
            name = None if subject is None and options is not None else _name(subject)
            accepted = _texts(answers, "answer", LONGEST_NAME)
            _check_question(question, name)
            _check_characters(relation, "relation")
            number = popularity_of(popularity)
        except Rejected as reason:
            self.rejected.append((file, row, str(reason)))
            return
        self._ids.add(fact_id)
        relation = unicodedata.normalize("NFC", visible(relation))
        self.rows.append((fact_id, name, relation, question, accepted, options, number, self.source))

    def clean(self, text: Any, row: object, *, name: bool = False) -> Any:
        """A text without invisible characters, which are remembered; of a name the usual spaces too."""
        if not isinstance(text, str):
            return text
        seen = spaced(visible(text)) if name else visible(text)
        for char in taken_off(text if name else spaced(text)) if seen != text else ():
            self._invisible.setdefault(char, row)
        return seen

    def reject(self, file: str, row: int, reason: str) -> None:
        """List a row that cannot even be taken apart."""
        self.rejected.append((file, row, reason))

    def read(self) -> Read:
        """What was collected; says which invisible characters were taken off."""
        if self._invisible:
            named = ", ".join(self._invisible)
            first = next(iter(self._invisible.values()))
            log.warning(
                "note: %s: invisible characters are taken off (%s), first in %s %s",
                self.source,
                named,
                self.place,
                first,
            )
        return Read(
            pd.DataFrame(self.rows, columns=COLUMNS).astype({"popularity": float}),
            pd.DataFrame(self.rejected, columns=REJECTED_COLUMNS),
        )


def placed(question: str, subject: str, template: str | None = None) -> str:
    """A question with `{subject}` where the subject stands, other braces doubled.

    Args:
        question: the text, the subject in it verbatim.
        subject: the name.
        template: the question with `{subject}` in the subject's place, where the source publishes it; it decides
            which of several occurrences is meant.

    Raises:
        Rejected: the subject is not in the question, or several times without a template that says where.
    """
    if template is not None and template.replace("{subject}", subject) == question:
        return template
    spellings = (subject, *(unicodedata.normalize(form, subject) for form in ("NFC", "NFD")))
    subject = next((one for one in spellings if one and one in question), subject)
    if not subject or subject not in question:
        raise Rejected(f"the subject {subject[:80]!r} is absent from its question {question[:80]!r}")
    if question.find(subject) != question.rfind(subject):
        raise Rejected(f"the subject {subject[:80]!r} stands more than once in {question[:80]!r}")
    before, after = question.split(subject)
    return f"{escaped(before)}{{subject}}{escaped(after)}"


def subject_of(question: str, template: str) -> str | None:
    """The name in the place of a template's `{subject}`; None where the question is not of the template."""
    before, after = template.split("{subject}")
    if len(question) < len(before) + len(after) or not (question.startswith(before) and question.endswith(after)):
        return None
    return question[len(before) : len(question) - len(after)]


def escaped(text: str) -> str:
    """Text whose braces survive `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")


def _check_characters(text: str, what: str) -> None:
    """Refuse broken characters; in questions only those that no tokenizer takes, since published ones hold others."""
    if what in ("question", "choice") and not any("\ud800" <= char <= "\udfff" for char in text):
        return
    if found := broken(text):
        raise Rejected(f"the {what} {text[:80]!r} holds {found}")


def _name(subject: object) -> str:
    if isinstance(subject, int | float) and subject == subject:
        raise Rejected(f"the subject {subject!r} is a number: write it as text")
    if not isinstance(subject, str) or not subject.strip():
        raise Rejected("there is no subject")
    if len(subject) > LONGEST_NAME:
        raise Rejected(f"a subject of {len(subject)} characters is no name")
    _check_characters(subject, "subject")
    if any(char in subject.strip() for char in _BREAKS):
        raise Rejected(f"the subject {subject[:80]!r} holds a line break or tab")
    return subject.strip()


def _texts(values: object, what: str, longest: int) -> list[str]:
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
        raise Rejected(f"there is no {what}")
    texts = []
    for value in values:
        if isinstance(value, int | float) and value == value:
            raise Rejected(f"the {what} {value!r} is a number: write it as text")
        if not isinstance(value, str) or not value.strip():
            raise Rejected(f"there is an empty {what}")
        _check_characters(value, what)
        if what == "answer" and any(char in value.strip() for char in _BREAKS + "\u2028\u2029"):
            raise Rejected(f"the answer {value[:80]!r} holds a line break or tab")
        if what == "answer" and not any(char.isalnum() or ord(char) > 127 for char in value):
            raise Rejected(f"the answer {value[:80]!r} is punctuation alone")
        if len(value) > longest:
            raise Rejected(f"a {what} of {len(value)} characters is none")
        texts.append(value.strip())
    return list(dict.fromkeys(texts)) if what == "answer" else texts


def _check_question(question: Any, subject: str | None) -> None:
    if question is None:
        return
    _check_characters(question, "question")
    if len(question) > LONGEST_QUESTION:
        raise Rejected(f"a question of {len(question)} characters is none")
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(question) if field is not None]
    except ValueError:
        raise Rejected(f"the braces of the question {question[:80]!r} do not match") from None
    if fields != (["subject"] if subject is not None else []):
        raise Rejected(f"the question {question[:80]!r} must hold {{subject}} once")


def popularity_of(value: object) -> float:
    """A number of at least 0, NaN where there is none; Rejected where it is something else."""
    if value is None or value is pd.NA or (isinstance(value, str) and not value.strip()):
        return math.nan
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise Rejected(f"popularity {str(value)[:80]!r} is not a number") from None
    if math.isinf(number) or number < 0:
        raise Rejected(f"popularity {str(value)[:80]!r} is no count")
    return number


def read_text(path: Path) -> str:
    """A file's text, without a byte-order mark; BadInput where it is missing or not UTF-8."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BadInput(f"{path} cannot be read: {error.strerror}") from None
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise BadInput(f"{path}: is UTF-16 text, as Excel's 'Unicode text' is: save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = len(_LINE_END.findall(content[: error.start].decode("utf-8", "replace"))) + 1
        raise BadInput(
            f"{path}:{line}: is not UTF-8 text (byte 0x{content[error.start]:02x}): save it as UTF-8"
        ) from None


class KeyTwice(ValueError):
    """An object in JSON that holds a key twice, of which only one would be read."""


def json_of(text: str) -> Any:
    """A text's JSON.

    Raises:
        KeyTwice: an object holds a key twice, at whatever depth.
        ValueError, RecursionError: it is no JSON.
    """
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise KeyTwice(f"an object holds the key {twice[:80]!r} twice: leave one")
    return found


def read_json(path: Path) -> Any:
    """A file's JSON; BadInput where it is none, or where an object holds a key twice."""
    try:
        return json_of(read_text(path))
    except KeyTwice as error:
        raise BadInput(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path} is not JSON: {error}") from None


def csv_rows(
    path: Path, text: str, delimiter: str = ",", first: int = 1, *, spaces: bool = True
) -> Iterator[tuple[int, list[str]]]:
    """A text's rows of cells, however large, each with the line it begins on; blank lines left out.

    Args:
        path, text: the file and what it holds.
        delimiter: between cells.
        first: number of the text's first line.
        spaces: whether spaces that begin a cell belong to it; else a quote may stand behind them.

    Raises:
        BadInput: quotes do not match; the message names the line where the row begins.
    """
    limit, line = csv.field_size_limit(sys.maxsize), first
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, skipinitialspace=not spaces)
    try:
        for cells in rows:
            if cells:
                yield line, cells
            line = rows.line_num + first
    except csv.Error as error:
        behind = ", or for spaces behind one" if "expected after" in str(error) else ""
        raise BadInput(
            f"{path}:{line}: cannot be read as a row of a table ({error}): look for a quote that is open or not "
            f"doubled{behind}"
        ) from None
    finally:
        csv.field_size_limit(limit)


def read_csv(path: Path, delimiter: str = ",") -> list[list[str]]:
    """A file's rows of cells, blank lines left out; BadInput where quotes do not match."""
    return [cells for _, cells in csv_rows(path, read_text(path), delimiter)]


def read_records(path: Path, reader: Reader, needed: Sequence[str], delimiter: str = ",") -> Iterator[tuple[int, dict]]:
    """Rows of a file with a header, as dicts; a row with another number of cells is listed.

    Raises:
        BadInput: no such file, no UTF-8, or a column that is missing.
    """
    rows = read_csv(path, delimiter)
    header = rows[0] if rows else []
    missing = [name for name in needed if name not in header]
    if missing:
        raise BadInput(f"{path}: lacks the columns {', '.join(missing)}; it has {', '.join(header)[:200]}")
    for number, cells in enumerate(rows[1:]):
        if len(cells) != len(header):
            reader.reject(str(path), number, f"{len(cells)} cells instead of {len(header)}")
        else:
            yield number, dict(zip(header, cells, strict=True))
