"""Intervals and verdicts."""

from __future__ import annotations

import re

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from subjattn.errors import BadInput
from subjattn.evidence.claims import Claim
from subjattn.evidence.contrasts import Interval, contrast, mean_interval
from subjattn.evidence.pooled import pooled_contrast, pooled_interval


def per_fact(values: np.ndarray) -> xr.DataArray:
    return xr.DataArray(values, {"fact": [f"f{i}" for i in range(len(values))]}, ("fact",))


def claim(direction: str = "decrease", smallest_effect: float = 1.0) -> Claim:
    return Claim(
        id="c", statement="s", measure="accuracy", arms=("a", "b"), direction=direction, smallest_effect=smallest_effect
    )


def test_interval_is_close_to_the_t_interval() -> None:
    """For 300 normal differences the bootstrap and Student's interval nearly agree."""
    values = np.random.default_rng(0).normal(0.3, 1.0, 300)
    found = mean_interval(values)
    half = 1.968 * values.std(ddof=1) / np.sqrt(300)
    assert found.estimate == pytest.approx(values.mean())
    assert found.ci_low == pytest.approx(values.mean() - half, abs=0.01)
    assert found.ci_high == pytest.approx(values.mean() + half, abs=0.01)


def test_interval_covers_at_its_level() -> None:
    rng = np.random.default_rng(1)
    hits = [low <= 0.5 <= high for low, high in (vars_of(rng.exponential(0.5, 80)) for _ in range(200))]
    assert 0.88 <= np.mean(hits) <= 0.99


def vars_of(values: np.ndarray) -> tuple[float, float]:
    interval = mean_interval(values)
    return interval.ci_low, interval.ci_high


def test_contrast_pairs_facts_by_name() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.normal(0, 10, 100)
    a, b = per_fact(difficulty + 0.5 + rng.normal(0, 0.1, 100)), per_fact(difficulty)
    found = contrast(a, b.isel(fact=rng.permutation(100)))
    assert found.estimate == pytest.approx(0.5, abs=0.05)
    assert found.ci_high - found.ci_low < 0.1, "an unpaired interval would be about 5 wide"


def test_contrast_refuses_other_facts_and_gaps() -> None:
    a = per_fact(np.ones(5))
    with pytest.raises(BadInput, match="not measured on the same facts"):
        contrast(a, a[:4])
    with pytest.raises(BadInput, match="1 of 5 facts have no finite value"):
        contrast(a, a.where(a["fact"] != "f2"))
    with pytest.raises(BadInput, match="one value per fact"):
        contrast(a.expand_dims(layer=2), a)


def test_no_change_of_a_binary_measure_is_not_certainty() -> None:
    """Planted: 30 facts of which none changed must not give an interval of width 0."""
    same = per_fact(np.tile([0.0, 1.0], 15))
    found = contrast(same, same)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.1, 0.1))
    assert claim(smallest_effect=0.02).judge(found)[0] == "undecided"
    flipped = contrast(same * 0 + 1, same * 0)
    assert (flipped.ci_low, flipped.ci_high) == pytest.approx((0.9, 1.0))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-3.0, -1.5, "supported"),
        (-3.0, -0.5, "undecided"),
        (-0.5, -0.1, "no effect that matters"),
        (-0.9, 0.9, "no effect that matters"),
        (-0.5, 1.5, "undecided"),
        (-3.0, 3.0, "undecided"),
        (1.5, 3.0, "contradicted"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    interval = Interval((low + high) / 2, low, high, 100)
    assert claim("decrease").judge(interval)[0] == verdict
    mirrored = Interval(-(low + high) / 2, -high, -low, 100)
    assert claim("increase").judge(mirrored)[0] == verdict


@given(st.floats(-5, 5), st.floats(0, 5), st.sampled_from(["increase", "decrease"]))
def test_every_interval_has_one_verdict_and_its_mirror_the_opposite(low: float, width: float, direction: str) -> None:
    opposite = {"supported": "contradicted", "contradicted": "supported"}
    interval, mirror = Interval(low, low, low + width, 50), Interval(-low, -low - width, -low, 50)
    found = claim(direction).judge(interval)[0]
    assert claim(direction).judge(mirror)[0] == opposite.get(found, found)


def test_few_facts_decide_nothing() -> None:
    assert claim().judge(Interval(-9.0, -10.0, -8.0, 19))[0] == "undecided"


@pytest.mark.parametrize(
    ("interval", "verdict", "reason"),
    [
        (Interval(0.0, -0.1, 0.1, 19), "undecided", "19 facts: under 20 an interval is too narrow to be believed"),
        (Interval(-3.0, -4.0, -2.0, 50), "supported", "effect of at least 1 in the claimed direction"),
        (Interval(3.0, 2.0, 4.0, 50), "contradicted", "effect of at least 1 in the other direction"),
        (Interval(0.0, -0.5, 0.5, 50), "no effect that matters", "lies within ±1"),
        (Interval(-1.0, -2.0, 0.0, 50), "undecided", r"reaches across \+1 \("),
        (Interval(0.0, -2.0, 2.0, 50), "undecided", r"reaches across -1 and \+1"),
    ],
)
def test_every_verdict_has_its_reason(interval: Interval, verdict: str, reason: str) -> None:
    found, why = claim("decrease", 1.0).judge(interval)
    assert found == verdict
    assert re.search(reason, why)


def test_pooled_intervals_are_close_to_the_delta_method() -> None:
    """A ratio of means of 300 facts; and its difference between two arms, paired."""
    rng = np.random.default_rng(0)
    y = rng.normal(2, 0.5, 300)
    x = 0.6 * y + rng.normal(0, 0.2, 300)
    dataset = xr.Dataset({"x": ("fact", x), "y": ("fact", y)})

    def ratio(one: xr.Dataset) -> float:
        return float(one["x"].mean() / one["y"].mean())

    found = pooled_interval([dataset], ratio)
    assert found is not None
    theta = x.mean() / y.mean()
    half = 1.968 * (x - theta * y).std(ddof=1) / y.mean() / np.sqrt(300)
    assert (found.estimate, found.n) == (pytest.approx(theta), 300)
    assert found.ci_high - found.estimate == pytest.approx(half, rel=0.01)
    other = xr.Dataset({"x": ("fact", x + 0.1 * y), "y": ("fact", y)})
    difference = pooled_contrast([other], [dataset], ratio)
    assert difference is not None
    assert difference.estimate == pytest.approx(0.1)
    assert difference.ci_high - difference.ci_low < 1e-6, "what both arms share cancels"
    twice = pooled_interval([dataset, other], ratio)
    assert twice is not None and twice.estimate == pytest.approx(theta + 0.05), "mean over replicates"


def test_a_pooled_quantity_that_is_not_defined_has_no_interval() -> None:
    dataset = xr.Dataset({"x": ("fact", np.ones(30))})
    assert pooled_interval([dataset], lambda _: float("nan")) is None
    few = pooled_interval([dataset.isel(fact=slice(19))], lambda one: float(one["x"].mean()))
    assert few is not None and not np.isfinite(few.ci_high), "as with claims: under 20 facts no interval is believed"


def test_a_pooled_contrast_stands_on_facts_that_count_in_both_arms() -> None:
    """Each arm keeps other pairs; the difference is of those that both keep, and says how many."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=60)
    keeps = [np.arange(60) < 50, np.arange(60) >= 10]
    arms = [xr.Dataset({"x": ("fact", np.where(keep, x, 99.0))}).assign_coords(kept=("fact", keep)) for keep in keeps]

    def mean(one: xr.Dataset) -> float:
        return float(one["x"].mean())

    found = pooled_contrast([arms[0]], [arms[1]], mean)
    assert found is not None and (found.estimate, found.n) == (0.0, 40)
    own = pooled_interval([arms[0]], mean)
    assert own is not None and own.n == 50 and own.estimate == pytest.approx(x[:50].mean())
    none = xr.Dataset({"x": ("fact", x)}).assign_coords(kept=("fact", np.zeros(60, bool)))
    assert pooled_interval([none], mean) is None
