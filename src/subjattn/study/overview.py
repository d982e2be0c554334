"""One table of a study: a row for each arm and style, a column for each quantity it names, with intervals."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pandas as pd

from subjattn.run.folder import Folder
from subjattn.study.config import StudyConfig
from subjattn.study.terms import Terms, or_reason
from subjattn.study.values import Values


KNOWN = {"known": "top", "unknown": "bottom"}
"""Thirds of the ranking that a column may be of, as in `accuracy:known`."""


def overview(
    config: StudyConfig, folder: Folder, inside: pd.DataFrame, facts: pd.DataFrame
) -> Iterator[dict[str, Any]]:
    """A row for each arm and style: `cells` holds `estimate`, `low` and `high` of each column, null where undefined.

    Args:
        config: the study, whose `overview` names the columns: a quantity, or `quantity:known`, of facts of the upper
            third, and `quantity:unknown`, of the lower.
        folder: of the run.
        inside: values of facts of relations that are not held out.
        facts: those tested.
    """
    terms = {third: Terms(config, folder, Values(inside[inside["third"] == third]), facts) for third in KNOWN.values()}
    terms[""] = Terms(config, folder, Values(inside), facts)
    for arm in config.arms if config.overview else ():
        for style in config.styles_of(arm):
            cells = {}
            for column in config.overview:
                quantity, _, which = column.partition(":")
                tested, _ = or_reason(terms[KNOWN.get(which, "")].arm, quantity, arm, style)
                low, high = (None, None) if tested is None else tested.interval.ends()
                cells[column] = {"estimate": tested and tested.interval.estimate, "low": low, "high": high}
            yield {"arm": arm, "style": style, "cells": cells}
