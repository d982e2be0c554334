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

from subjattn.evidence.contrasts import Interval


Verdict = Literal["supported", "contradicted", "no effect that matters", "undecided"]
Measure = Literal["accuracy", "answer_logprob", "attention_to_subject", "knockout_drop", "knockout_drop_total"]
MIN_FACTS = 20
"""With fewer facts a bootstrap interval is too narrow to be believed, and every verdict is `undecided`."""


class Claim(BaseModel):
    """A statement about the difference of a measure between two arms."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    id: Annotated[str, Field(min_length=1)]
    statement: Annotated[str, Field(min_length=1)]
    measure: Measure
    arms: Annotated[tuple[str, str], Field(description="the contrast is the first minus the second")]
    direction: Literal["increase", "decrease"]
    smallest_effect: Annotated[PositiveFloat, Field(description="in the measure's unit")]

    def verdict(self, interval: Interval) -> Verdict:
        """What the interval of `arms[0] − arms[1]` says of the claim."""
        if interval.n < MIN_FACTS:
            return "undecided"
        low, high = interval.ci_low, interval.ci_high
        if self.direction == "decrease":
            low, high = -high, -low
        if low >= self.smallest_effect:
            return "supported"
        if high <= -self.smallest_effect:
            return "contradicted"
        if -self.smallest_effect <= low and high <= self.smallest_effect:
            return "no effect that matters"
        return "undecided"
