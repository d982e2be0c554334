"""What lost the answers that a tuned model no longer gives: a table of rules over what `mediation` says of an arm.

An account is supported where all its signs are there, contradicted where one is there the other way, and else open: a
sign is a quantity's 95 % interval wholly above or below a level. The rules are stated before any result; how often they
name what was planted is in docs/validation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.ratios import mean_of
from subjattn.measures.mediation import MEASURE


Status = Literal["supported", "contradicted", "open"]
Ends = tuple[float, float] | list[float] | None
ENOUGH = 20
"""Answers lost, on average over replicates, below which it is open what lost them."""
LOST, HARDLY, MOST = 0.05, 0.1, 0.5
"""Of the answers, below what it is not asked what lost them, and below what hardly any is lost; of the margin lost,
what carries it."""


@dataclass(frozen=True)
class Sign:
    """A quantity above, or below, a level.

    One that only `vetoes` contradicts where it is there the other way, and need not be there; but it has to be known.
    """

    quantity: str
    side: Literal["above", "below"]
    level: float
    vetoes: bool = False

    def status(self, ends: Ends) -> Status:
        low, high = ends or (-float("inf"), float("inf"))
        above, below = low > self.level, high < self.level
        there, other_way = (above, below) if self.side == "above" else (below, above)
        if self.vetoes:
            return "contradicted" if other_way else "open" if ends is None else "supported"
        return "supported" if there else "contradicted" if other_way else "open"

    def seen(self, ends: Ends) -> str:
        """What is known of it, in words."""
        return f"{self.quantity}: {'not defined' if ends is None else f'{ends[0]:.2f} to {ends[1]:.2f}'}"


@dataclass(frozen=True)
class Account:
    """By what answers may have been lost, and the signs that it needs."""

    name: str
    statement: str
    signs: tuple[Sign, ...]


_LOST = Sign("answers_lost", "above", LOST)


def _most(mediator: str) -> tuple[Sign, ...]:
    """That it carries most of what was lost, as other positions do not."""
    return Sign(f"mediated.{mediator}", "above", MOST), Sign(f"mediated_placebo.{mediator}", "below", MOST)


def _not_most(*mediators: str) -> tuple[Sign, ...]:
    return tuple(Sign(f"mediated.{mediator}", "below", MOST) for mediator in mediators)


_ATTENTION, _VALUES, _MLPS = "attention to the subject", "values at the subject", "MLP outputs at the subject"

ACCOUNTS = (
    Account(
        "attention looks away",
        "what was lost is what the prediction no longer attends to of the name (Ghosal et al. 2024)",
        (_LOST, *_most(_ATTENTION), *_not_most(_MLPS)),
    ),
    Account(
        "values shrunk",
        "the name is attended to, and what is read there is no longer what it was",
        (_LOST, *_most(_VALUES), Sign("values_over_mlps", "above", 0.0)),
    ),
    Account(
        "MLP path damaged",
        "what the MLPs make of the name, before it is read, is no longer what it was (Kaplan et al. 2026)",
        (_LOST, *_most(_MLPS), Sign("values_over_mlps", "below", 0.0, vetoes=True)),
    ),
    Account(
        "answer prior",
        "answers are dearer or cheaper than they were, whoever is asked about (Kang et al. 2024)",
        (_LOST, Sign("mediated.answer prior", "above", MOST), *_not_most(_ATTENTION, _VALUES, _MLPS)),
    ),
    Account(
        "nothing lost",
        "of the answers that the base starts rightly hardly one is lost",
        (Sign("answers_lost", "below", HARDLY),),
    ),
)


def mediated(found: xr.Dataset) -> dict[str, Ends]:
    """Ends of the 95 % interval of every quantity of `mediation`, over facts; None where it is not defined.

    Args:
        found: from `sa.mediation`.

    Returns:
        By name: `n_lost` (how many answers, twice), `answers_changed`, `answers_lost`, `answers_won`, `margin_lost`,
        and `mediated` and `mediated_placebo` of each mediator, such as `mediated.values at the subject`, shares of the
        margin lost.
    """
    intervals: dict[str, Ends] = {}
    for quantity in MEASURE.quantities:
        array = quantity.per_fact(found)
        if quantity.name == "answers_lost":
            intervals["n_lost"] = (float(array.sum()),) * 2
        parts = array["part"].values.tolist() if "part" in array.dims else [None]
        for part in parts:
            values = array if part is None else array.sel(part=part, drop=True)
            name = quantity.name if part is None else f"{quantity.name}.{part}"
            try:
                over = None if quantity.over is None else quantity.over(found)
                intervals[name] = mean_of(values, over, bounds=quantity.bounds).ends()
            except BadInput:
                intervals[name] = None
    return intervals


def diagnose(intervals: Mapping[str, Ends]) -> list[dict[str, Any]]:
    """What the quantities of `mediation` in a tuned arm say of each account.

    Args:
        intervals: ends of 95 % intervals by quantity, None where it is not defined; others may be among them.

    Returns:
        A row for each account, none where nothing that it needs was measured: `account`, `statement`, `status`, and
        `because`, the quantities of its signs with their intervals: of a contradicted account, those that are there
        the other way; of an open one, those that leave it open; it is open where fewer than 20 answers were lost. Where
        two would be supported, which contradict each other, both are open and named.
    """
    if "answers_lost" not in intervals:
        return []
    rows, lost = [], (intervals.get("n_lost") or (0.0,))[0]
    for account in ACCOUNTS:
        found = [(sign, sign.status(intervals.get(sign.quantity))) for sign in account.signs]
        if _LOST in account.signs and lost < ENOUGH and (_LOST, "contradicted") not in found:
            found = [(Sign("n_lost", "above", ENOUGH), "open")]
        each = {status for _, status in found}
        status: Status = "contradicted" if "contradicted" in each else "open" if "open" in each else "supported"
        because = [sign.seen(intervals.get(sign.quantity)) for sign, own in found if own == status]
        rows.append({"account": account.name, "statement": account.statement, "status": status, "because": because})
    named = [row for row in rows if row["status"] == "supported"]
    if len(named) > 1:
        for row in named:
            row |= {"status": "open", "because": [f"either {' or '.join(str(one['account']) for one in named)}"]}
    return rows
