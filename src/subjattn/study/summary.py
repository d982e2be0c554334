"""From the values of a run to its summary: arms, contrasts, verdicts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any

import pandas as pd
import xarray as xr

from subjattn.evidence.changes import judge_changes
from subjattn.evidence.claims import Claim, Judged, judge
from subjattn.evidence.diagnosis import diagnose
from subjattn.evidence.intervals import CONFIDENCE, MIN_REPLICATES, Interval
from subjattn.evidence.power import Planned
from subjattn.facts.splits import THIRDS
from subjattn.measures.record import Measure, Quantity
from subjattn.models import describe
from subjattn.run.folder import Folder
from subjattn.study import files
from subjattn.study.across import across
from subjattn.study.config import StudyConfig
from subjattn.study.flips import flips
from subjattn.study.over import over_training
from subjattn.study.overview import overview
from subjattn.study.registration import Registered
from subjattn.study.terms import Terms, Tested, or_reason
from subjattn.study.values import Values


NOT_DEFINED = "not defined"
"""What is said of quantities that have no value."""
DIRECT_SHARE = 0.5
"""From this share of the total knock-out on, the subject is said to be read directly."""
INTERVAL = (
    *("estimate", "ci_low", "ci_high", "p_value", "df", "scope", "n_facts", "n_replicates", "variance_shares"),
    *("adjusted_ci_low", "adjusted_ci_high"),
)
"""Of contrasts and claims; null where they are not defined."""
LEANS = "facts were chosen by the right answers of {}, so differences from it lean away from them: no verdict"
OF_ARMS = ("accuracy", "answer_logprob")
"""Quantities shown by third of the ranking."""


@dataclass
class Summary:
    """One run's results.

    Attributes:
        config: the study.
        folder: its finished stages.
        table: of the values of all arms.
        facts: those tested.
        registered: which claims and contrasts were stated before anything was measured.
    """

    config: StudyConfig
    folder: Folder
    table: pd.DataFrame
    facts: pd.DataFrame
    registered: Registered

    def __post_init__(self) -> None:
        outside = self.table["out_of_distribution"].to_numpy(bool)
        self.inside, self.outside = (
            Terms(self.config, self.folder, Values(self.table[rows]), self.facts) for rows in (~outside, outside)
        )

    def content(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        config = self.config
        arms = {arm: self._arm(self.inside, arm) for arm in config.arms}
        content = {
            "study": config.name,
            "model": config.model,
            "described": describe(config.model),
            "replicates": self.config.replicates.model_dump(),
            "registered": self.registered.digest,
            "dropped": self.registered.dropped(config),
            "scorer": config.scorer,
            "where": config.facts.where,
            "untrained": config.untrained,
            "quantities": self._described(),
            "not_defined": self._not_defined,
            "arms": arms,
            "across": list(across(config, self.inside, arms)),
            "contrasts": list(self._contrasts()),
            "diagnosis": list(_diagnosis(config, self.inside, arms)),
            "flips": list(flips(config, self.inside)),
            "overview": list(overview(config, self.folder, self.inside.values.table, self.facts)),
            "over_training": list(over_training(config, self.folder, self.facts)),
            "claims": self._claims(),
        }
        if len(self.outside.values.table):
            content["out_of_distribution"] = {arm: self._arm(self.outside, arm) for arm in config.arms}
        return content

    def _quantities(self) -> Iterator[tuple[Measure, Quantity]]:
        for measure in self.config.measured:
            for quantity in measure.quantities:
                yield measure, quantity

    def _first(self, measure: Measure) -> str:
        """The arm that says what a measure is: the reference, or a tuned arm where a base is needed beside it."""
        among = filter(self.config.is_tuned if "base" in measure.needs else None, self.config.arms)
        return next(among, self.config.reference)

    def _described(self) -> dict[str, dict[str, Any]]:
        """Unit, definition and paper of every quantity: the array's own, which go by settings, else the record's."""
        found = {}
        for measure, quantity in self._quantities():
            arm = self._first(measure)
            styles = (self.inside.datasets(arm, style, measure.name) for style in self.config.styles)
            dataset = next((found for some in styles for found in some.values()), None)
            own = {} if dataset is None or quantity.over else quantity.per_fact(dataset).attrs
            found[quantity.name] = {
                "unit": str(own.get("unit", quantity.unit)),
                "definition": str(own.get("definition") or quantity.definition),
                "paper": measure.paper,
                "across": "base" in measure.needs,
            }
        return found

    @cached_property
    def _not_defined(self) -> dict[str, dict[str, str]]:
        """Why quantities have no value, by name and style; one style says it for all its arms."""
        found: dict[str, dict[str, str]] = {}
        for measure, quantity in self._quantities():
            for style in self.config.styles:
                arm = self._first(measure)
                stage = files.measured(arm, self.config.replicates_of(arm)[0], style, measure.name)
                if reason := files.not_defined(self.folder.path(stage)):
                    found.setdefault(quantity.name, {})[style] = reason
        return found

    def _arm(self, terms: Terms, arm: str) -> dict[str, Any]:
        by_style = {style: self._arm_in_style(terms, arm, style) for style in self.config.styles_of(arm)}
        return {**by_style[next(iter(by_style))], "styles": by_style}

    def _arm_in_style(self, terms: Terms, arm: str, style: str) -> dict[str, Any]:
        means: dict[str, float | None] = {}
        intervals: dict[str, Any] = {}
        undefined: dict[str, int] = {}
        replicates: dict[str, dict[str, float]] = {}
        for _, quantity in self._quantities():
            for part in terms.values.parts(quantity.name) or [""] * (quantity.name in self._not_defined):
                name = _key(quantity.name, part)
                tested, _ = or_reason(terms.arm, name, arm, style)
                means[name] = None if tested is None else tested.interval.estimate
                intervals[name] = None if tested is None else list(tested.interval.ends())
                if tested is None:
                    means[name] = _plain_mean(terms.values.of(arm, style, quantity.name, part), quantity)
                    continue
                if tested.interval.n_undefined:
                    undefined[name] = tested.interval.n_undefined
                for replicate, mean in tested.replicates.items():
                    replicates.setdefault(replicate, {})[name] = mean
        correct = terms.values.of(arm, style, "accuracy")
        about: dict[str, Any] = {
            "n_test": 0 if correct is None else correct.sizes["fact"],
            **means,
            "intervals": intervals,
        }
        about["by_popularity_third"] = self._by_third(terms, arm, style)
        if terms is self.inside:
            about["route"] = self._route(arm, style, means)
        if undefined:
            about["n_undefined"] = undefined
        if replicates:
            about["replicates"] = replicates
        return about

    def _by_third(self, terms: Terms, arm: str, style: str) -> dict[str, Any]:
        third = self.facts.set_index("fact_id")["third"]
        found: dict[str, Any] = {}
        for name in THIRDS[::-1]:
            for quantity in OF_ARMS:
                own = terms.values.of(arm, style, quantity)
                if own is None or not (inside := (third.reindex(own["fact"].values) == name).to_numpy()).any():
                    continue
                found.setdefault(name, {"n": int(inside.sum())})[quantity] = _mean(own[inside])
        return found

    def _route(self, arm: str, style: str, means: dict[str, Any]) -> dict[str, Any]:
        """How the subject reaches the answer: the direct edges' share of what all routes are worth."""
        if means.get("knockout_drop_total") is None:
            return {"reading": NOT_DEFINED, "direct_share": None}
        share = means.get("direct_share")
        if share is not None and share > 1 + DIRECT_SHARE:
            return {"reading": "not additive", "direct_share": share}
        if share is not None:
            return {"reading": "direct" if share >= DIRECT_SHARE else "relay", "direct_share": share}
        same = all(bool(one["routes_coincide"].all()) for one in self.inside.datasets(arm, style, "knockout").values())
        return {"reading": "routes coincide" if same else "no effect seen", "direct_share": None}

    def _contrasts(self) -> Iterator[dict[str, Any]]:
        units, rows = self._described(), []
        for style in self.config.styles:
            for a, b in self.config.contrasts:
                if style not in self.config.styles_of_all([a, b]):
                    continue
                for measure, quantity in self._quantities():
                    if "base" in measure.needs and not (self.config.is_tuned(a) and self.config.is_tuned(b)):
                        continue
                    for part in self.inside.values.parts(quantity.name):
                        name = _key(quantity.name, part)
                        row = {"measure": name, "unit": units[quantity.name]["unit"], "arm_a": a, "arm_b": b}
                        rows.append((row | {"style": style}, *or_reason(self.inside.contrast, name, a, b, style)))
        family = sum(tested is not None for _, tested, _ in rows)
        least = {quantity.name: self._smallest(quantity) for _, quantity in self._quantities()}
        judged = self._changes([(row, tested) for row, tested, _ in rows], least)
        for i, (row, tested, reason) in enumerate(rows):
            found = _interval(tested, family, reason) | judged.get(i, {"verdict": None})
            if tested is not None and self._leans(row):
                found["reason"] = LEANS.format(self.config.untrained)
            yield row | found | {"registered": self.registered.contrast(row, self.config)}

    def _leans(self, row: Mapping[str, Any]) -> bool:
        """Whether the facts of a contrast were chosen by the answers of one of its arms."""
        chosen = self.config.facts.where == "correct" and row["measure"] != "accuracy"
        return chosen and self.config.untrained in (row["arm_a"], row["arm_b"])

    def _smallest(self, quantity: Quantity) -> float | None:
        return self.config.smallest_effects.get(quantity.name, quantity.smallest_effect)

    def _changes(
        self, rows: Sequence[tuple[Mapping[str, Any], Tested | None]], least: Mapping[str, float | None]
    ) -> dict[int, dict[str, Any]]:
        """Verdicts on contrasts with a value and a smallest effect, by number."""
        found: dict[int, tuple[Interval, float]] = {}
        for i, (row, tested) in enumerate(rows):
            smallest = least[row["measure"].partition(".")[0]]
            if tested is not None and smallest is not None and not self._leans(row):
                found[i] = (tested.interval, smallest)
        return {i: change.to_dict() for i, change in zip(found, judge_changes([*found.values()]), strict=True)}

    def _claims(self) -> list[dict[str, Any]]:
        """Every claim in each style it is about; those with a value are judged together.

        Those without one count in the family all the same: whether a claim is defined may depend on the data.
        """
        asked = [(claim, style) for claim in self.config.claims for style in self.config.styles_of_claim(claim)]
        found = [or_reason(self.inside.claim, claim, style) for claim, style in asked]
        pairs = [(claim, tested.interval) for (claim, _), (tested, _) in zip(asked, found, strict=True) if tested]
        alone = [
            claim.primary and style == self.config.styles_of_claim(claim)[0]
            for (claim, style), (tested, _) in zip(asked, found, strict=True)
            if tested
        ]
        dropped = sum(len(self.registered.claims[name]["order"]) for name in self.registered.dropped(self.config))
        dropped += sum(
            tested is None and not (claim.primary and style == self.config.styles_of_claim(claim)[0])
            for (claim, style), (tested, _) in zip(asked, found, strict=True)
        )
        judged, styles = (
            iter(judge(pairs, alone, dropped)),
            {claim.id: dict[str, Any]() for claim in self.config.claims},
        )
        for (claim, style), (tested, reason) in zip(asked, found, strict=True):
            styles[claim.id][style] = _claim_row(claim, tested, next(judged) if tested else None, reason)
        return [
            {
                **claim.model_dump(mode="json", exclude={"scope"}),
                **next(iter(styles[claim.id].values())),
                "about": claim.formula,
                "registered": self.registered.claim(claim, self.config),
                "styles": styles[claim.id],
            }
            for claim in self.config.claims
        ]


def _diagnosis(config: StudyConfig, terms: Terms, arms: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What lost the answers of each tuned arm, by style; a row for each account."""
    for arm, style in product(filter(config.is_tuned, config.arms), config.styles):
        if style not in config.styles_of(arm):
            continue
        intervals = dict(arms[arm]["styles"][style]["intervals"])
        if (lost := terms.values.of(arm, style, "answers_lost")) is not None:
            intervals["n_lost"] = (float(lost.sum("fact").mean()),) * 2
        yield from ({"arm": arm, "style": style} | row for row in diagnose(intervals))


def _interval(tested: Tested | None, family: int, reason: str) -> dict[str, Any]:
    """An interval as plain data, and every replicate's own value beside it; or why there is none."""
    if tested is None:
        return dict.fromkeys(INTERVAL) | {"reason": reason}
    low, high = tested.interval.ends(1 - (1 - CONFIDENCE) / max(1, family))
    row = tested.interval.to_dict() | {"adjusted_ci_low": low, "adjusted_ci_high": high, "family": family}
    return row | ({"replicates": tested.replicates} if tested.replicates else {})


def _claim_row(claim: Claim, tested: Tested | None, judged: Judged | None, reason: str) -> dict[str, Any]:
    if tested is None or judged is None:
        return {"verdict": NOT_DEFINED, **_interval(None, 1, reason)}
    row = _interval(tested, judged.family, "") | judged.to_dict()
    if judged.verdict == "undecided":
        row["needed"] = needed(claim, tested.interval, judged.family)
    return row


def needed(claim: Claim, found: Interval, family: int) -> dict[str, Any]:
    """How many facts and replicates would decide a claim, if its effect and variances are those seen."""
    planned = Planned(
        found.variances, claim.turned(found.estimate), claim.smallest_effect, family=family, drawn=found.drawn
    )
    return planned.needed(max(found.n_replicates, MIN_REPLICATES) if found.drawn else found.n_replicates)


def _key(quantity: str, part: str) -> str:
    return f"{quantity}.{part}" if part else quantity


def _plain_mean(values: xr.DataArray | None, quantity: Quantity) -> float | None:
    """The mean of what has no interval, such as values that are all the same; None for shares."""
    return None if values is None or quantity.over is not None else _mean(values)


def _mean(values: xr.DataArray) -> float | None:
    return float(values.mean()) if bool(values.notnull().any()) else None
