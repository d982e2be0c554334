"""What the differences between two arms say of why answers changed: a table of rules over their verdicts.

An account is supported where every sign it needs is there, contradicted where one of them is there the other way (no
change that matters being the other way too), and open in all other cases: not measured, undecided, or none decided.
The rules are stated before any result; how often they name what was planted is in docs/validation.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from subjattn.evidence.changes import Direction


Status = Literal["supported", "contradicted", "open"]
FALLS: frozenset[Direction] = frozenset({"falls"})
RISES: frozenset[Direction] = frozenset({"rises"})
SAME: frozenset[Direction] = frozenset({"no change that matters"})
STAYS: frozenset[Direction] = SAME | RISES
"""Does not fall."""


@dataclass(frozen=True)
class Sign:
    """Something that an account predicts, of any of some quantities that measure the same.

    It is there where one of them has a verdict in `there`, and there the other way where all that are decided have one
    in `other_way`.
    """

    quantities: tuple[str, ...]
    there: frozenset[Direction]
    other_way: frozenset[Direction]

    def status(self, verdicts: Mapping[str, Direction | None]) -> Status:
        decided = [own for name in self.quantities if (own := verdicts.get(name)) not in (None, "undecided")]
        if any(own in self.there for own in decided):
            return "supported"
        return "contradicted" if decided and all(own in self.other_way for own in decided) else "open"

    def seen(self, verdicts: Mapping[str, Direction | None]) -> list[str]:
        """Its quantities with what is known of them."""
        return [f"{name}: {verdicts.get(name) or 'not measured'}" for name in self.quantities]


@dataclass(frozen=True)
class Account:
    """Why answers may have changed, and the signs that it needs."""

    name: str
    statement: str
    signs: tuple[Sign, ...]


_LOOKS = ("attention_without_sinks", "attention_over_its_place")
_COUNTS = ("knockout_calibrated_total", "knockout_rank_rise")
_DEPENDS = ("swap_distance", "swap_flips")
_NAME_COUNTS_LESS = Sign((*_COUNTS, *_DEPENDS), FALLS, STAYS)
_LOOKS_AS_BEFORE = Sign(_LOOKS, STAYS, FALLS)

ACCOUNTS = (
    Account(
        "attention looks away",
        "the prediction attends less to the name, and the answer depends less on it (Ghosal et al. 2024)",
        (Sign(_LOOKS, FALLS, STAYS), _NAME_COUNTS_LESS),
    ),
    Account(
        "values shrunk",
        "the name is attended to as before, but less is moved from it",
        (_LOOKS_AS_BEFORE, Sign(("attention_value_weighted",), FALLS, STAYS), _NAME_COUNTS_LESS),
    ),
    Account(
        "MLP path damaged",
        "the name is read as before, and what the MLPs make of it is less (Kaplan et al. 2026)",
        (
            _LOOKS_AS_BEFORE,
            Sign(("attention_value_weighted",), STAYS, FALLS),
            Sign(("mlp_contribution",), FALLS, STAYS),
            _NAME_COUNTS_LESS,
        ),
    ),
    Account(
        "answer prior",
        "answers move towards those that are frequent in training, whoever is asked about (Kang et al. 2024)",
        (
            Sign(("entropy_excess", "prior_distance"), FALLS, STAYS),
            Sign(("modal_answer", "detached_errors"), RISES, SAME | FALLS),
        ),
    ),
    Account(
        "nothing changed",
        "answers, their log-probability and their dependence on the name are as before",
        (
            Sign(("accuracy",), SAME, RISES | FALLS),
            Sign(("answer_logprob", "calibrated_logprob"), SAME, RISES | FALLS),
            Sign((*_DEPENDS, *_COUNTS), SAME, RISES | FALLS),
        ),
    ),
)


def diagnose(verdicts: Mapping[str, Direction | None]) -> list[dict[str, Any]]:
    """What verdicts on differences, by quantity, say of each account.

    Args:
        verdicts: of one arm minus another, such as tuned minus base; quantities that were not measured may be missing.

    Returns:
        A row for each account of which at least one sign was measured: `account`, `statement`, `status`, and `because`,
        the quantities of its signs with their verdicts: of a contradicted account, those of the signs that are there
        the other way; of an open one, those that leave it open.
    """
    rows = []
    for account in ACCOUNTS:
        if not any(verdicts.get(name) for sign in account.signs for name in sign.quantities):
            continue
        found = [(sign, sign.status(verdicts)) for sign in account.signs]
        each = {status for _, status in found}
        status: Status = "contradicted" if "contradicted" in each else "open" if "open" in each else "supported"
        because = [line for sign, own in found if own == status for line in sign.seen(verdicts)]
        rows.append({"account": account.name, "statement": account.statement, "status": status, "because": because})
    return rows
