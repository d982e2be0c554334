"""Claims with a direction and a smallest effect that matters, and the verdict an interval gives them.

The line of possible effects, turned so that the claimed direction is positive, has three parts:

    opposite            too small to matter             claimed
    ──────────── −smallest_effect ──── 0 ──── smallest_effect ────────────

`supported` and `contradicted`: the effect is beyond the smallest one at 5 %, two-sided, after Holm's correction for
the family of claims it belongs to. `no effect that matters`: the plain 95 % interval lies between both, which is two
one-sided tests at 2.5 % (Schuirmann 1987). Else `undecided`. A difference from zero alone supports nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator

from subjattn.evidence.intervals import (
    CONFIDENCE,
    FAMILY_REPLICATES,
    MIN_FACTS,
    MIN_REPLICATES,
    Interval,
    Scope,
)


Verdict = Literal["supported", "contradicted", "no effect that matters", "undecided"]
Arms = Annotated[tuple[str, ...], Field(min_length=1, max_length=2)]
OneLine = Annotated[str, Field(min_length=1, pattern=r"^[^\p{C}\u2028\u2029]*[^\p{C}\s][^\p{C}\u2028\u2029]*$")]
"""A text that shows, without line breaks and control characters."""
Where = dict[str, str | int | list[str | int]]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Minus(_Part):
    """What is subtracted: the same as the claim, but for what is named here."""

    measure: str | None = None
    arms: Arms | None = None
    style: str | None = None
    where: Where | None = None

    @model_validator(mode="after")
    def _differs(self) -> Self:
        if not self.model_fields_set:
            raise ValueError("'minus' names what is different: measure, arms, style or where")
        return self


class Select(_Part):
    """Cells of an array chosen by a rule: where the measure is largest, in a model or draws that are not tested."""

    top: PositiveInt = Field(description="so many cells")
    over: Annotated[list[str], Field(min_length=1, description="dimensions whose cells they are: layer, head")]
    on: str | int = Field(
        "reference", description="the reference model, or so many first draws of the claim's arms, left out of the test"
    )

    @model_validator(mode="after")
    def _known(self) -> Self:
        if isinstance(self.on, str) and self.on != "reference":
            raise ValueError("'on' is 'reference', or a number of draws")
        if isinstance(self.on, int) and self.on < 1:
            raise ValueError("'on' is 'reference', or at least one draw")
        return self


class Claim(_Part):
    """A statement about a quantity: of one arm against a number, between two arms, or as a difference of such."""

    id: OneLine
    statement: Annotated[str, Field(min_length=1)]
    measure: Annotated[str, Field(min_length=1, description="a quantity of a measure of the study")]
    arms: Annotated[Arms, Field(description="one; or two, the first minus the second")]
    minus: Minus | None = Field(None, description="makes it a difference of differences")
    against: float = Field(0.0, description="the number that the value is compared with")
    direction: Literal["increase", "decrease"]
    smallest_effect: Annotated[PositiveFloat, Field(description="in the measure's unit")]
    style: str | None = Field(None, description="None: judged in every style")
    where: Where = Field({}, description="cells of the measure's array: {layer: 15-20, head: [1, 4]}")
    select: Select | None = Field(None, description="cells by a rule")
    scope: Scope | None = Field(None, description="None: 'training' where there are replicates")
    primary: bool = Field(False, description="judged at full level in its (first) style, apart from the family")

    @property
    def sides(self) -> list[tuple[float, str, tuple[str, ...], str | None, Where]]:
        """What is added up: sign, quantity, arms, style (None: the one judged) and cells."""
        own = (1.0, self.measure, self.arms, None, self.where)
        if self.minus is None:
            return [own]
        other = self.minus
        where = self.where if other.where is None else other.where
        return [own, (-1.0, other.measure or self.measure, other.arms or self.arms, other.style, where)]

    @property
    def formula(self) -> str:
        """What is claimed, in one line: `attention_to_subject[layer 15-20]: a − b, below 0 by 0.005 or more`."""
        texts = []
        for _, measure, arms, style, where in self.sides:
            cells = ", ".join(f"{dim} {_listed(of)}" for dim, of in where.items())
            texts.append(
                f"{measure}{f'[{cells}]' if cells else ''}: {' − '.join(arms)}{f' in {style}' if style else ''}"
            )
        about = texts[0] if len(texts) == 1 else f"({texts[0]}) − ({texts[1]})"
        if self.select is not None:
            on = self.select.on if isinstance(self.select.on, str) else f"first {self.select.on} draws"
            about += f", in the {self.select.top} largest cells of {' × '.join(self.select.over)} (chosen on {on})"
        verb = {"increase": "above", "decrease": "below"}[self.direction]
        return f"{about}, {verb} {self.against:g} by {self.smallest_effect:g} or more"

    @property
    def words(self) -> tuple[str, str, str, str]:
        """How reasons name the claimed direction, the other one, what a sign means, and what is judged together."""
        return "in the claimed direction", "in the other direction", " (positive is the claimed direction)", "claims"

    def turned(self, value: float) -> float:
        """A value as an effect in the claimed direction."""
        return (value - self.against) * (1 if self.direction == "increase" else -1)

    def p_value(self, interval: Interval) -> float:
        """Two-sided, of the effect being just the smallest one that matters, or just its opposite; 1 between them."""
        effect, sign = self.turned(interval.estimate), 1 if self.direction == "increase" else -1
        if abs(effect) <= self.smallest_effect:
            return 1.0
        edge = self.smallest_effect if effect > 0 else -self.smallest_effect
        return interval.p_value(self.against + sign * edge)


def _listed(of: str | int | list[str | int]) -> str:
    return ", ".join(map(str, of)) if isinstance(of, list) else str(of)


@dataclass(frozen=True)
class Judged:
    """A claim's verdict in one style, with the interval and p-value adjusted for its family."""

    verdict: Verdict
    reason: str
    adjusted_low: float
    adjusted_high: float
    adjusted_p: float
    family: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "verdict": self.verdict,
            "reason": self.reason,
            "adjusted_ci_low": self.adjusted_low,
            "adjusted_ci_high": self.adjusted_high,
            "adjusted_p": self.adjusted_p,
            "family": self.family,
        }


def judge(claims: Sequence[tuple[Claim, Interval]], alone: Sequence[bool], dropped: int = 0) -> list[Judged]:
    """Verdicts on a study's claims, which are one family but for those judged alone.

    Args:
        claims: each with the interval of its value, one for every style it is judged in.
        alone: which of them are primary: tested at full level, and not counted among the others.
        dropped: claims that were stated once and are no more, or turn out to have no value; they count in the family.
    """
    ps = [claim.p_value(interval) for claim, interval in claims]
    family = [i for i, apart in enumerate(alone) if not apart]
    adjusted = dict(zip(family, holm([*(ps[i] for i in family), *[1.0] * dropped]), strict=False))
    sizes = [1 if apart else len(family) + dropped for apart in alone]
    return [_judged(claim, interval, adjusted.get(i, ps[i]), sizes[i]) for i, (claim, interval) in enumerate(claims)]


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's (1979) adjusted p-values, in the order given."""
    if not ps:
        return []
    from scipy.stats import rankdata

    order = rankdata(ps, "ordinal") - 1
    ordered, found, largest = sorted(ps), [], 0.0
    for i, p in enumerate(ordered):
        largest = max(largest, min(1.0, p * (len(ps) - i)))
        found.append(largest)
    return [found[int(place)] for place in order]


def _judged(claim: Claim, interval: Interval, p: float, family: int) -> Judged:
    verdict, reason = _verdict(claim, interval, p, family)
    many = interval.drawn and family > 1 and interval.n_replicates < FAMILY_REPLICATES
    if many and verdict in ("supported", "contradicted"):
        reason += f"; {interval.n_replicates} replicates, where a family of {claim.words[-1]} wants {FAMILY_REPLICATES}"
    low, high = interval.ends(1 - (1 - CONFIDENCE) / family)
    return Judged(verdict, reason, low, high, p, family)


def _verdict(claim: Claim, interval: Interval, p: float, family: int) -> tuple[Verdict, str]:
    smallest, effect = f"{claim.smallest_effect:g}", claim.turned(interval.estimate)
    claimed, other, signs, judged = claim.words
    if interval.n_facts < MIN_FACTS:
        return "undecided", f"{interval.n_facts} facts: under {MIN_FACTS} an interval is too narrow to be believed"
    if interval.drawn and interval.n_replicates < MIN_REPLICATES:
        return "undecided", f"two {interval.kind} are a screen: {MIN_REPLICATES} decide"
    among = f", among {family} {judged} (Holm's p = {p:.2g})" if family > 1 else ""
    if p <= 1 - CONFIDENCE:
        verdict: Verdict = "supported" if effect > 0 else "contradicted"
        return verdict, f"an effect of at least {smallest} {claimed if effect > 0 else other}{among}"
    low, high = sorted(claim.turned(end) for end in interval.ends())
    if -claim.smallest_effect <= low and high <= claim.smallest_effect:
        return "no effect that matters", f"the whole interval lies within ±{smallest}"
    if low >= claim.smallest_effect or high <= -claim.smallest_effect:
        return "undecided", f"by itself its interval would decide{among} it does not"
    ends = [end for end in (-claim.smallest_effect, claim.smallest_effect) if low < end < high]
    across = " and ".join(f"{end:+g}" for end in ends)
    return "undecided", f"the interval reaches across {across}{signs}"
