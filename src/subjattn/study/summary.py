"""From the values of a run to its summary: arms, contrasts, verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from subjattn.evidence.contrasts import Interval, contrast
from subjattn.evidence.pooled import pooled_contrast, pooled_interval
from subjattn.facts.splits import THIRDS
from subjattn.measures.record import Measure, Quantity
from subjattn.models import describe
from subjattn.run.folder import Folder
from subjattn.study import files
from subjattn.study.config import StudyConfig
from subjattn.study.values import Values, datasets, replicates_of


NOT_DEFINED = "not defined"
"""What is said of quantities that have no value."""
DIRECT_SHARE = 0.5
"""From this share of the total knock-out on, the subject is said to be read directly."""
OF_ARMS = ("accuracy", "answer_logprob")
"""Quantities shown by third of the ranking."""


@dataclass
class Summary:
    """One run's results.

    Attributes:
        config: the study.
        folder: its finished stages.
        values: of all arms.
        facts: those tested.
    """

    config: StudyConfig
    folder: Folder
    table: pd.DataFrame
    facts: pd.DataFrame
    _held: dict[tuple[str, str, str], list[xr.Dataset]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        outside = self.table["out_of_distribution"].to_numpy(bool)
        self.inside, self.outside = Values(self.table[~outside]), Values(self.table[outside])

    def content(self) -> dict[str, Any]:
        """What `summary.json` holds."""
        config = self.config
        content = {
            "study": config.name,
            "model": config.model,
            "described": describe(config.model),
            "caveat": self.caveat(),
            "scorer": config.scorer,
            "quantities": self._described(),
            "not_defined": self._not_defined(),
            "arms": {arm: self._arm(self.inside, arm) for arm in config.arms},
            "contrasts": [*self._contrasts(), *self._pooled_contrasts()],
            "claims": [self._claim(claim) for claim in config.claims],
        }
        if len(self.outside.table):
            content["out_of_distribution"] = {arm: self._arm(self.outside, arm) for arm in config.arms}
        return content

    def caveat(self) -> str:
        """What every interval here does not say."""
        many = self.config.replicates
        if not self.config.trained:
            origin = "these models as they are"
        elif many.draws * many.seeds == 1:
            origin = "one seed"
        else:
            origin = f"mean of {many.draws} draws × {many.seeds} seeds"
        inside = self.facts[~self.facts["out_of_distribution"]]
        groups = inside.groupby(["relation", "answer"], dropna=False).ngroups
        shared = (
            f"; {len(inside)} facts share {groups} answers and count as independent" if groups < len(inside) else ""
        )
        return f"{origin}: interval over facts only{shared}"

    def _quantities(self) -> Iterator[tuple[Measure, Quantity]]:
        for measure in self.config.measured:
            for quantity in measure.quantities:
                yield measure, quantity

    def _described(self) -> dict[str, dict[str, str]]:
        """Unit, definition and paper of every quantity: the array's own, which go by settings, else the record's."""
        found = {}
        for measure, quantity in self._quantities():
            styles = (self._datasets(self.config.reference, style, measure.name) for style in self.config.styles)
            dataset = next((some[0] for some in styles if some), None)
            own = quantity.per_fact(dataset).attrs if quantity.per_fact and dataset is not None else {}
            found[quantity.name] = {
                "unit": str(own.get("unit", quantity.unit)),
                "definition": str(own.get("definition", quantity.definition)),
                "paper": measure.paper,
            }
        return found

    def _not_defined(self) -> dict[str, dict[str, str]]:
        """Why quantities have no value, by name and style; one style says it for all its arms."""
        found: dict[str, dict[str, str]] = {}
        for measure, quantity in self._quantities():
            for style in self.config.styles:
                arm = self.config.reference
                stage = files.measured(arm, replicates_of(self.config, arm)[0], style, measure.name)
                if reason := files.not_defined(self.folder.path(stage)):
                    found.setdefault(quantity.name, {})[style] = reason
        return found

    def _arm(self, values: Values, arm: str) -> dict[str, Any]:
        by_style = {style: self._arm_in_style(values, arm, style) for style in self.config.styles}
        return {**by_style[next(iter(by_style))], "styles": by_style}

    def _arm_in_style(self, values: Values, arm: str, style: str) -> dict[str, Any]:
        means: dict[str, float | None] = {}
        undefined: dict[str, int] = {}
        replicates: dict[str, dict[str, float]] = {}
        for _, quantity in self._quantities():
            if quantity.per_fact is None:
                continue
            for part in values.parts(quantity.name) or [""]:
                name, wide = _key(quantity.name, part), values.of(arm, style, quantity.name, part)
                means[name] = None if wide is None else _mean(wide.mean(axis=1, skipna=False))
                if wide is None:
                    continue
                if missing := int(wide.isna().any(axis=1).sum()):
                    undefined[name] = missing
                if wide.shape[1] > 1:
                    for replicate in wide:
                        replicates.setdefault(_replicate(replicate), {})[name] = float(wide[replicate].mean())
        correct = values.mean_of(arm, style, "accuracy")
        found: dict[str, Any] = {"n_test": 0 if correct is None else len(correct), **means}
        found["by_popularity_third"] = self._by_third(values, arm, style)
        if values is self.inside:
            found["pooled"] = self._pooled(arm, style)
            found["route"] = self._route(arm, style, means, found["pooled"])
        if undefined:
            found["n_undefined"] = undefined
        if replicates:
            found["replicates"] = replicates
        return found

    def _by_third(self, values: Values, arm: str, style: str) -> dict[str, Any]:
        third = self.facts.set_index("fact_id")["third"]
        found: dict[str, Any] = {}
        for name in THIRDS[::-1]:
            for quantity in OF_ARMS:
                own = values.mean_of(arm, style, quantity)
                if own is None or not (inside := (third.reindex(own.index) == name).to_numpy()).any():
                    continue
                found.setdefault(name, {"n": int(inside.sum())})[quantity] = _mean(own[inside])
        return found

    def _pooled(self, arm: str, style: str) -> dict[str, Any]:
        found = {}
        for measure, quantity in self._quantities():
            if quantity.pooled is not None and (own := self._datasets(arm, style, measure.name)):
                found[quantity.name] = _as_dict(pooled_interval(own, quantity.pooled))
        return found

    def _route(self, arm: str, style: str, means: dict[str, Any], pooled: dict[str, Any]) -> dict[str, Any]:
        """How the subject reaches the answer: the direct edges' share of what all routes are worth."""
        if means.get("knockout_drop_total") is None:
            return {"reading": NOT_DEFINED, "direct_share": None}
        share = (pooled.get("direct_share") or {}).get("estimate")
        if share is not None:
            return {"reading": "direct" if share >= DIRECT_SHARE else "relay", "direct_share": share}
        same = all(bool(one["routes_coincide"].all()) for one in self._datasets(arm, style, "knockout"))
        return {"reading": "routes coincide" if same else "hardly used", "direct_share": None}

    def _datasets(self, arm: str, style: str, measure: str) -> list[xr.Dataset]:
        """Arrays of one arm, kept while that arm is summed up."""
        key = (arm, style, measure)
        if key not in self._held:
            if len(self._held) > len(self.config.measures) * 2:
                self._held.clear()
            self._held[key] = datasets(self.config, self.folder, arm, style, measure, self.facts)
        return self._held[key]

    def _contrasts(self) -> Iterator[dict[str, Any]]:
        units = self._described()
        for style in self.config.styles:
            for a, b in self.config.contrasts:
                for _, quantity in self._quantities():
                    for part in self.inside.parts(quantity.name):
                        found = self._interval(quantity, part, a, b, style)
                        if found["estimate"] is not None:
                            name = _key(quantity.name, part)
                            yield {
                                "measure": name,
                                "unit": units[quantity.name]["unit"],
                                "arm_a": a,
                                "arm_b": b,
                                "style": style,
                            } | found

    def _pooled_contrasts(self) -> Iterator[dict[str, Any]]:
        for style in self.config.styles:
            for a, b in self.config.contrasts:
                for measure, quantity in self._quantities():
                    first, second = (self._datasets(arm, style, measure.name) for arm in (a, b))
                    if quantity.pooled is None or not first or not second:
                        continue
                    if (found := pooled_contrast(first, second, quantity.pooled)) is not None:
                        row = {"measure": quantity.name, "unit": quantity.unit, "arm_a": a, "arm_b": b, "style": style}
                        yield row | _as_dict(found)

    def _claim(self, claim: Any) -> dict[str, Any]:
        by_style: dict[str, dict[str, Any]] = {}
        name, _, part = claim.measure.partition(".")
        _, quantity = next(pair for pair in self._quantities() if pair[1].name == name)
        for style in self.config.styles:
            found = self._interval(quantity, part, claim.arms[0], claim.arms[1], style)
            if found["estimate"] is None:
                verdict, reason = (
                    NOT_DEFINED,
                    self._not_defined().get(name, {}).get(style, "no fact has a value"),
                )
            else:
                interval = Interval(*(found[name] for name in ("estimate", "ci_low", "ci_high", "n")))
                verdict, reason = claim.judge(interval)
            by_style[style] = {"verdict": verdict, "reason": reason, **found}
        fields = claim.model_dump(mode="json")
        return {**fields, **by_style[next(iter(by_style))], "caveat": self.caveat(), "styles": by_style}

    def _interval(self, quantity: Quantity, part: str, a: str, b: str, style: str) -> dict[str, Any]:
        """The mean paired difference over facts that have a value in both arms, and in each replicate."""
        wide = [self.inside.of(arm, style, quantity.name, part) for arm in (a, b)]
        first, second = (None if one is None else one.mean(axis=1, skipna=False) for one in wide)
        if first is None or second is None or wide[0] is None or wide[1] is None:
            return _as_dict(None)
        second = second.reindex(first.index)
        defined = first.notna() & second.notna()
        if not defined.any():
            return _as_dict(None)
        arrays = [
            xr.DataArray(one[defined].to_numpy(), {"fact": first.index[defined].to_numpy()}, ("fact",))
            for one in (first, second)
        ]
        found = _as_dict(contrast(*arrays, seed=self.config.seed))
        if not defined.all():
            found["n_undefined"] = int((~defined).sum())
        if max(one.shape[1] for one in wide if one is not None) > 1:
            found["replicates"] = _per_replicate(*(one[defined] for one in wide if one is not None))
        return found


def _per_replicate(a: pd.DataFrame, b: pd.DataFrame) -> dict[str, float]:
    """Mean difference in each replicate; an arm that has none counts the same in all."""
    names = [name for name in (*a.columns, *b.columns) if name != (-1, -1)]
    return {
        _replicate(name): float((a[name if name in a else (-1, -1)] - b[name if name in b else (-1, -1)]).mean())
        for name in dict.fromkeys(names)
    }


def _replicate(name: Any) -> str:
    draw, seed = name
    return f"draw{draw}-seed{seed}"


def _key(quantity: str, part: str) -> str:
    return f"{quantity}.{part}" if part else quantity


def _mean(values: pd.Series) -> float | None:
    return float(values.mean()) if values.notna().any() else None


def _as_dict(interval: Interval | None) -> dict[str, Any]:
    """An interval as plain data; ends that are not known as None."""
    if interval is None:
        return dict.fromkeys(Interval.__dataclass_fields__)
    return {name: of if np.isfinite(of) else None for name, of in vars(interval).items()}
