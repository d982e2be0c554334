"""Facts that ask the same question: merged where the answers agree, dropped where they do not.

Two facts ask the same question when relation and subject are the same but for case and spaces (without a subject:
relation, question and choices). Same accepted answers: the first stays, with the highest popularity. Other answers:
the name belongs to several things (homonyms), the question has no single answer, and all of them go.
"""

from __future__ import annotations

import pandas as pd

from subjattn.facts.table import REJECTED_COLUMNS, Read, plain_name


def unambiguous(facts: pd.DataFrame) -> Read:
    """The facts with one meaning each, and those that went: columns `file` (the source), `row` (fact id), `reason`."""
    asked = [
        (relation, plain_name(subject) if isinstance(subject, str) else (question, *choices))
        for relation, subject, question, choices in zip(
            facts["relation"], facts["subject"], facts["question"], facts["choices"], strict=True
        )
    ]
    groups: dict[tuple, list[int]] = {}
    for row, key in enumerate(asked):
        groups.setdefault(key, []).append(row)
    answers, ids = facts["answers"].tolist(), facts["fact_id"].tolist()
    popularity = facts["popularity"].to_numpy(float).copy()
    gone: dict[int, str] = {}
    for rows in (rows for rows in groups.values() if len(rows) > 1):
        first, *others = rows
        if len({frozenset(answer.casefold() for answer in answers[row]) for row in rows}) == 1:
            popularity[first] = pd.Series(popularity[rows]).max()
            gone |= dict.fromkeys(others, f"the same fact as {ids[first]}: merged")
        else:
            gone |= {
                row: f"asked with another answer in {ids[others[0] if row == first else first]}: dropped"
                for row in rows
            }
    kept = facts.assign(popularity=popularity).drop(index=facts.index[list(gone)]).reset_index(drop=True)
    sources = facts["source"].tolist()
    listed = [(sources[row], ids[row], reason) for row, reason in sorted(gone.items())]
    return Read(kept, pd.DataFrame(listed, columns=REJECTED_COLUMNS))
