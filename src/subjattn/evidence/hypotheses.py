"""A hypothesis about a set of heads or layers, or a route, tested: claims with their verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import xarray as xr

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim, Judged, judge
from subjattn.evidence.intervals import Interval, contrast, interval
from subjattn.evidence.ratios import ratio
from subjattn.measures.ablation import Ablated, At, To
from subjattn.measures.hypotheses import Named, ablate_hypothesis
from subjattn.measures.knockout import ROUTES, Route
from subjattn.measures.sets import Heads
from subjattn.measures.temperature import calibrated
from subjattn.prompts import Prompt


if TYPE_CHECKING:
    from subjattn.measures import Model

NEARLY = 0.01
"""How far a share has to lie from the one stated."""


@dataclass(frozen=True)
class Tested:
    """Verdicts on a hypothesis by claim, with intervals; `arrays` per fact.

    Claims are `necessity`, `sufficiency` and, of two models, `change` and `calibrated_change`.

    An interval is None where the claim's number is not defined; the verdict then says why.
    """

    verdicts: dict[str, Judged | str]
    intervals: dict[str, Interval | None]
    arrays: xr.Dataset

    def __str__(self) -> str:
        lines = []
        for name, verdict in self.verdicts.items():
            found = self.intervals[name]
            if found is None or isinstance(verdict, str):
                lines.append(f"{name}: not defined: {verdict}")
            else:
                low, high = found.ends()
                lines.append(
                    f"{name}: {verdict.verdict}, {found.estimate:.3g} [{low:.3g}, {high:.3g}]: {verdict.reason}"
                )
        return "\n".join(lines)


def test_hypothesis(
    model: Model,
    prompts: Sequence[Prompt],
    *,
    heads: Heads | None = None,
    layers: Sequence[int] | None = None,
    route: Route | None = None,
    component: Ablated = "z",
    at: At = "all",
    to: To = "mean",
    keeps: float = 0.5,
    smallest_effect: float = 0.1,
    base: Model | None = None,
    random_sets: int = 8,
    seed: int = 0,
) -> Tested:
    """Whether a set that was named beforehand is needed and enough for the answer, and whether tuning changed that.

    A set that was chosen where it is tested looks needed by choice: choose on other facts (`choose_heads`), another
    model, or draws that are left out. The claims are judged together, by Holm.

    Args:
        model: a `LoadedModel` or a plain Hugging Face causal model in eval mode.
        prompts: whom to ask, at least 20 for a verdict.
        heads: the set, as `(layer, head)`; or
        layers: whole layers, of `component` `attn_out` or `mlp_out`; or
        route: attention edges, by the name that `knockout` has for them. They are blocked, and compared with as many
            other edges of the same queries. Whether it is enough is asked of `direct` and `relayed`, by blocking all
            other edges from later positions to the subject.
        component: what of them is ablated: `z` of heads, `attn_out` or `mlp_out`.
        at: at which positions: `all`, `subject` or `prediction`.
        to: what it becomes: `mean`, `resample` or `zero`.
        keeps: the share of what all of the kind do that is enough.
        smallest_effect: nats by which the set has to cost more than random ones, and by which tuning has to change it.
        base: the model before tuning, for the claim `change`: needed more (or, contradicted, less) than there; and
            `calibrated_change`, the same with each model at its own temperature, which sureness alone cannot move.
        random_sets: as many that match it in number and layer.
        seed: of the random sets.

    Returns:
        See `Tested`.

    Raises:
        BadInput: no set, one outside the model or of all there is, or a share outside 0 to 1.
    """
    if not 0 < keeps < 1:
        raise BadInput(f"keeps={keeps}: give the share that is enough, between 0 and 1")
    if route is not None and route not in ROUTES:
        raise BadInput(f"route {route!r} is not one of {', '.join(ROUTES)}")
    try:
        named = Named(
            heads=None if heads is None else tuple((int(a), int(b)) for a, b in heads),
            layers=None if layers is None else tuple(map(int, layers)),
            route=route,
            component=component,
            at=at,
            to=to,
        )
    except ValueError:
        raise BadInput(
            "give heads=[(layer, head), …] with component 'z', layers=[…] with component 'attn_out' or 'mlp_out', or a "
            "route by itself"
        ) from None

    def without(one: Model) -> xr.Dataset:
        at_own = None if base is None else calibrated(one, prompts)[0]
        return ablate_hypothesis(one, prompts, named, at_own=at_own, random_sets=random_sets, seed=seed)

    own = without(model)
    needed = own["drop"] - own["random_drop"]
    asked: dict[str, tuple[Any, Claim]] = {
        "necessity": (lambda: interval(needed), _claim("necessity", 0.0, smallest_effect)),
        "sufficiency": (
            lambda: interval(ratio(own["all_drop"] - own["others_drop"], own["all_drop"], positive=True)),
            _claim("sufficiency", keeps, NEARLY),
        ),
    }
    if base is not None:
        before = without(base)
        for name, kind in (("change", ""), ("calibrated_change", "calibrated_")):
            sides = [of[f"{kind}drop"] - of[f"{kind}random_drop"] for of in (own, before)]
            asked[name] = (partial(contrast, *sides), _claim(name, 0.0, smallest_effect))
        own = own.assign({f"base_{name}": before[name] for name in before})
    intervals: dict[str, Interval | None] = {}
    verdicts: dict[str, Judged | str] = {}
    for name, (made, _) in asked.items():
        try:
            intervals[name] = made()
        except BadInput as error:
            intervals[name], verdicts[name] = None, str(error)
    there = [name for name, found in intervals.items() if found is not None]
    judged = judge([(asked[name][1], intervals[name]) for name in there], [False] * len(there))  # type: ignore[misc]
    verdicts |= dict(zip(there, judged, strict=True))
    return Tested({name: verdicts[name] for name in asked}, intervals, own)


def _claim(name: str, against: float, smallest: float) -> Claim:
    return Claim(
        id=name,
        statement=name,
        measure=name,
        arms=("model",),
        direction="increase",
        against=against,
        smallest_effect=smallest,
    )
