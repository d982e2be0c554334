"""Facts whose subject gives its answer away: Guinea-Bissau → Bissau, Mexico City → Mexico.

To answer them a model need not know the fact: it may copy from the name.
"""

from __future__ import annotations

import re
import unicodedata

import pandas as pd

from subjattn.errors import BadInput
from subjattn.facts.table import check_table


_UNSPACED = re.compile("([\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff])")
"""Kana and ideographs, written without spaces: each counts as a word."""


def answer_in_subject(facts: pd.DataFrame) -> pd.Series:
    """Whether an accepted answer stands in the subject, from word to word; case, accents and punctuation do not count.

    "Mexico" stands in "Mexico City", "Niger" not in "Nigeria"; of an answer "The Gambia" the article does not count.
    Multiple-choice questions, and facts without a subject, have none.

    Args:
        facts: a table of facts, from `load_facts`.

    Returns:
        Booleans on the facts' index.

    Example:
        >>> facts = load_facts(pd.DataFrame({"subject": ["Guinea-Bissau", "Nigeria"], "answer": ["Bissau", "Niger"]}))
        >>> answer_in_subject(facts).tolist()
        [True, False]
    """
    check_table(facts, "subject", "answers")
    choices = facts["choices"] if "choices" in facts else pd.Series(None, facts.index, dtype=object)
    found = [
        isinstance(subject, str) and options is None and any(_stands_in(answer, subject) for answer in answers)
        for subject, answers, options in zip(facts["subject"], facts["answers"], choices, strict=True)
    ]
    return pd.Series(found, facts.index, name="answer_in_subject", dtype=bool)


def without_given(facts: pd.DataFrame) -> pd.DataFrame:
    """The facts whose subject does not hold the answer; BadInput where none is left."""
    left = facts[~answer_in_subject(facts)].reset_index(drop=True)
    if left.empty:
        raise BadInput(f"all {len(facts)} facts have their answer in the subject's name: none is left")
    return left


def _stands_in(answer: str, subject: str) -> bool:
    wanted, words = _words(answer), _words(subject)
    if len(wanted) > 1 and wanted[0] == "the":
        wanted = wanted[1:]
    return bool(wanted) and any(words[i : i + len(wanted)] == wanted for i in range(len(words) - len(wanted) + 1))


def _words(text: str) -> list[str]:
    plain = [char for char in unicodedata.normalize("NFKD", text.casefold()) if not unicodedata.combining(char)]
    letters = [char if char.isalnum() or unicodedata.category(char).startswith("M") else " " for char in plain]
    return _UNSPACED.sub(r" \1 ", "".join(letters).casefold()).split()
