"""Facts that ask the same question: merged where the answers agree, dropped where they do not.

Two facts ask the same question when relation and subject are the same (without a subject: relation, question and
choices), by names as `plain_name` compares them: case, spaces and normal forms do not count. Same accepted answers:
the first stays, with the highest popularity. Other answers: the name belongs to several things (homonyms), the
question has no single answer, and all of them go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from subjattn.facts.names import plain_name
from subjattn.facts.table import REJECTED_COLUMNS, Read


def unambiguous(facts: pd.DataFrame, places: Mapping[str, tuple[str, Any, str]] | None = None) -> Read:
    """The facts with one meaning each, and those that went.

    Args:
        facts: a table of facts.
        places: by fact id its file, its row, and that row in words; without, the source and the fact id.
    """
    asked = [
        (relation, plain_name(subject) if isinstance(subject, str) else tuple(map(plain_name, (question, *choices))))
        for relation, subject, question, choices in zip(
            facts["relation"], facts["subject"], facts["question"], facts["choices"], strict=True
        )
    ]
    groups: dict[tuple, list[int]] = {}
    for row, key in enumerate(asked):
        groups.setdefault(key, []).append(row)
    answers, ids = facts["answers"].tolist(), facts["fact_id"].tolist()
    sources = facts["source"].tolist()
    where = [(places or {}).get(of, (source, of, of)) for of, source in zip(ids, sources, strict=True)]
    popularity = facts["popularity"].to_numpy(float).copy()
    gone: dict[int, str] = {}
    for rows in (rows for rows in groups.values() if len(rows) > 1):
        first, *others = rows
        if len({frozenset(map(plain_name, answers[row])) for row in rows}) == 1:
            popularity[first] = pd.Series(popularity[rows]).max()
            gone |= dict.fromkeys(others, f"the same fact as {where[first][2]}: merged")
        else:
            gone |= {
                row: f"asked with another answer in {where[others[0] if row == first else first][2]}: dropped"
                for row in rows
            }
    kept = facts.assign(popularity=popularity).drop(index=facts.index[list(gone)]).reset_index(drop=True)
    listed = [(*where[row][:2], reason) for row, reason in sorted(gone.items())]
    return Read(kept, pd.DataFrame(listed, columns=REJECTED_COLUMNS))
