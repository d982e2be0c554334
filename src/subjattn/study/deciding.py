"""What a study can decide: the power of its claims at the variances that a finished run has seen."""

from __future__ import annotations

from typing import Any

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.evidence.power import Planned
from subjattn.measures.record import quantity_of
from subjattn.study.config import StudyConfig
from subjattn.study.files import Run


FACTS = (60, 120, 240, 480, 960)
REPLICATES = (3, 4, 5, 8, 12)


def power_of(run: Run) -> list[dict[str, Any]]:
    """For every claim and style of a run: the share of studies of other sizes that would decide it.

    Returns:
        Rows with `claim`, `style`, `estimate` (with its own sign, as in tables and plots), `direction`, the one that is
        claimed, `smallest_effect`, `scope`, `curve`: for each number of replicates, the share by number of facts.
    """
    rows = []
    for claim, styles in _seen(run):
        for style, row in styles.items():
            if row["estimate"] is None:
                continue
            drawn = row["scope"].startswith("this way")
            plan = Planned(row["variances"], claim.turned(row["estimate"]), claim.smallest_effect, row["family"], drawn)
            sizes = REPLICATES if drawn else (row["n_replicates"],)
            rows.append(
                {
                    "claim": claim.id,
                    "style": style,
                    "estimate": row["estimate"],
                    "direction": claim.direction,
                    "smallest_effect": claim.smallest_effect,
                    "scope": row["scope"],
                    "verdict": row["verdict"],
                    "needs": needed_in_words(row["needed"]) if row.get("needed") else "",
                    "curve": {r: {f: plan.decided(f, r)["decided"] for f in FACTS} for r in sizes},
                }
            )
    return rows


def foreseen(config: StudyConfig, pilot: Run) -> list[dict[str, Any]]:
    """What each claim of a study would come to, were its variances those of a pilot run.

    Returns:
        Rows with `claim`, `style`, and the share of studies with each verdict (`decided` is their sum): if the
        effect is what the pilot saw, if there is none, and if it is twice the smallest that matters; `why` where
        nothing can be said.

    Raises:
        BadInput: the pilot has no claims.
    """
    rows_of = [((_tested(claim), style), row) for claim, styles in _seen(pilot) for style, row in styles.items()]
    seen = dict(sorted(rows_of, key=lambda of: str(of[1]["scope"]).startswith("this way")))
    if not seen:
        raise BadInput(f"{str(pilot.folder)!r} has no claims to learn variances from")
    asked = [(claim, style) for claim in config.claims for style in config.styles_of_claim(claim)]
    first = {claim.id: style for claim, style in reversed(asked)}
    alone = [claim.primary and style == first[claim.id] for claim, style in asked]
    family = max(1, len(asked) - sum(alone))
    rows = []
    for (claim, style), apart in zip(asked, alone, strict=True):
        found = seen.get((_tested(claim), style))
        shares = _foreseen(config, claim, found, pilot, 1 if apart else family)
        rows.append({"claim": claim.id, "style": style} | shares)
    return rows


def _foreseen(
    config: StudyConfig, claim: Claim, found: dict[str, Any] | None, pilot: Run, family: int
) -> dict[str, Any]:
    """One claim's shares, or why there are none."""
    if found is None or found["estimate"] is None:
        return {"why": "the pilot has no such claim"}
    trained = {arm for side in claim.sides for arm in side[2]} & config.replicated
    measures = {quantity_of(side[1].partition(".")[0], config.measured)[0].name for side in claim.sides}
    replicates = 1 if measures & set(config.replicates.first_only) or not trained else config.n_replicates
    replicates -= claim.select.on if claim.select and isinstance(claim.select.on, int) else 0
    drawn = claim.scope != "models" and replicates > 1
    if drawn and not found["scope"].startswith("this way"):
        return {"why": "the pilot has no replicates: it says nothing of how they vary"}
    facts = round(config.facts.n_test * found["n_facts"] / pilot.study["facts"]["n_test"])
    variances = dict(found["variances"])
    if not drawn:
        variances["facts"] += variances["interaction"] / replicates
        variances |= {"replicates": 0.0, "interaction": 0.0}
    effects = {
        "as in the pilot": claim.turned(found["estimate"]),
        "none": 0.0,
        "twice the smallest": 2 * claim.smallest_effect,
    }
    return {
        name: Planned(variances, effect, claim.smallest_effect, family, drawn).decided(facts, replicates)
        for name, effect in effects.items()
    }


def _tested(claim: Claim) -> str:
    """What a claim is about, without its name and its threshold."""
    return str(claim.model_dump(include={"measure", "arms", "minus", "against", "where", "select"}))


def _seen(run: Run) -> list[tuple[Claim, dict[str, Any]]]:
    """Every claim of a run, and what became of it by style."""
    claims = [Claim.model_validate(claim) for claim in run.study["claims"]]
    return [(claim, row["styles"]) for claim, row in zip(claims, run.summary["claims"], strict=True)]


def needed_in_words(needed: dict[str, Any]) -> str:
    """What an undecided claim would take, for a reader."""
    facts, replicates, alone = needed["facts"], needed["replicates"], needed["facts_alone"]
    if facts is None:
        return "If the effect is as seen here, not even 20,000 facts × 24 replicates would decide."
    size = f"{facts:,} facts" + (f" × {replicates} replicates" if replicates else "")
    more = "" if alone or not replicates else "; with the replicates there are, no number of facts would"
    return f"If the effect is as seen here, {size} would decide in 80 % of studies{more}."
