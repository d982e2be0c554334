"""Claims with a direction and a smallest effect that matters, and the verdict an interval gives them.

The line of possible effects, turned so that the claimed direction is positive, has three parts:

    opposite            too small to matter             claimed
    ──────────── −smallest_effect ──── 0 ──── smallest_effect ────────────

An interval that lies wholly in one part gives its verdict (`contradicted`, `no effect that matters`,
`supported`); one that reaches into two is `undecided`. A difference from zero alone supports nothing.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat

from subjattn.evidence.contrasts import MIN_FACTS, Interval


Verdict = Literal["supported", "contradicted", "no effect that matters", "undecided"]


class Claim(BaseModel):
    """A statement about the difference of a measure between two arms."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1)]
    statement: Annotated[str, Field(min_length=1)]
    measure: Annotated[str, Field(min_length=1, description="a quantity per fact of a measure of the study")]
    arms: Annotated[tuple[str, str], Field(description="the contrast is the first minus the second")]
    direction: Literal["increase", "decrease"]
    smallest_effect: Annotated[PositiveFloat, Field(description="in the measure's unit")]

    def judge(self, interval: Interval) -> tuple[Verdict, str]:
        """What the interval of `arms[0] − arms[1]` says of the claim, and why."""
        if interval.n < MIN_FACTS:
            return "undecided", f"{interval.n} facts: under {MIN_FACTS} an interval is too narrow to be believed"
        low, high = interval.ci_low, interval.ci_high
        if self.direction == "decrease":
            low, high = -high, -low
        effect = f"{self.smallest_effect:g}"
        if low >= self.smallest_effect:
            return "supported", f"the whole interval is an effect of at least {effect} in the claimed direction"
        if high <= -self.smallest_effect:
            return "contradicted", f"the whole interval is an effect of at least {effect} in the other direction"
        if -self.smallest_effect <= low and high <= self.smallest_effect:
            return "no effect that matters", f"the whole interval lies within ±{effect}"
        ends = [end for end in (-self.smallest_effect, self.smallest_effect) if low < end < high]
        across = " and ".join(f"{end:+g}" for end in ends)
        return "undecided", f"the interval reaches across {across} (positive is the claimed direction)"
