"""What changed between two arms, in either direction: verdicts on differences that nobody claimed beforehand.

The rule is that of `claims`, without a direction: `rises` and `falls` need a difference beyond the smallest one that
matters at 5 %, two-sided, after Holm's correction for all differences judged together; `no change that matters` the
whole interval within it; else `undecided`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from subjattn.evidence.claims import Claim, judge
from subjattn.evidence.intervals import Interval


Direction = Literal["rises", "falls", "no change that matters", "undecided"]
_VERDICTS: dict[str, Direction] = {
    "supported": "rises",
    "contradicted": "falls",
    "no effect that matters": "no change that matters",
    "undecided": "undecided",
}


class _Either(Claim):
    @property
    def words(self) -> tuple[str, str, str, str]:
        return "upward", "downward", "", "differences"


@dataclass(frozen=True)
class Change:
    """The verdict on a difference, why, and the p-value adjusted for its family."""

    verdict: Direction
    reason: str
    smallest_effect: float
    adjusted_p: float
    judged_together: int

    def to_dict(self) -> dict[str, Any]:
        return vars(self).copy()


def judge_changes(found: Sequence[tuple[Interval, float]]) -> list[Change]:
    """Verdicts on differences, each with the smallest effect that matters in its unit; all are one family."""
    claims = [
        _Either(
            id="change", statement="it changes", measure="any", arms=("a",), direction="increase", smallest_effect=least
        )
        for _, least in found
    ]
    judged = judge([(claim, one) for claim, (one, _) in zip(claims, found, strict=True)], [False] * len(claims))
    return [
        Change(_VERDICTS[one.verdict], one.reason, least, one.adjusted_p, one.family)
        for one, (_, least) in zip(judged, found, strict=True)
    ]


def difference(row: Mapping[str, Any]) -> str:
    """A contrast in words, `+0.21 [+0.04, +0.38] nats`, to as many digits as the interval's width gives reason for."""
    width = row["ci_high"] - row["ci_low"]
    digits = min(4, max(2, 1 + math.ceil(-math.log10(width)))) if width > 0 else 3
    unit = f" {row['unit']}" if row["unit"] == "nats" else ""
    return f"{row['estimate']:+.{digits}f} [{row['ci_low']:+.{digits}f}, {row['ci_high']:+.{digits}f}]{unit}"
